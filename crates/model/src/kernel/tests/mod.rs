//! A machine at work, with a toy device memory.

mod test_bench;
mod test_folios;
mod test_pager;
mod test_races;
mod test_random;
mod test_refused;
mod test_rights;
mod test_space;
