//! Operations on a machine that nobody else uses.

mod test_exclusive;
mod test_random;
mod test_rules;
mod test_transcript;
