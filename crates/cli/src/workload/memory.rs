//! [`Memory`], [`Array`], [`Words`] and [`File`]: where the data of a workload is. On the live host that is ordinary
//! memory of this process; on the model host it is memory of a process that exists only in a world.

use core::marker::PhantomData;
use core::sync::atomic::{AtomicU64, Ordering};
use std::borrow::Cow;
use std::io;
use std::path::Path;
use std::sync::Arc;

use gpusvm_live::FileMapping;
use gpusvm_model::kernel::ModelSpace;
use gpusvm_model::sched::ModelEnv;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::workload::{address_of, address_of_mut, count};
use crate::world::mapped::Mapped;

/// What an array can hold: whatever may have any bytes.
pub(crate) trait Element: FromBytes + IntoBytes + Immutable + Copy {}

impl<T: FromBytes + IntoBytes + Immutable + Copy> Element for T {}

/// The memory that a workload allocates from.
#[derive(Clone, Debug)]
pub(crate) enum Memory {
    /// This process's, by its allocator.
    Process,
    /// A process's of a world. Used by the world's actors alone.
    Model(Arc<ModelSpace<ModelEnv>>),
}

impl Memory {
    /// Allocates `n` elements; `fill` makes them, in order.
    pub(crate) fn array<T: Element>(&self, n: usize, fill: impl FnMut(usize) -> T) -> Array<T> {
        let all: Box<[T]> = (0..n).map(fill).collect();
        match self {
            Self::Process => Array(Place::Process(all)),
            Self::Model(space) => {
                let mapped = Mapped::new(space, count(size_of::<T>()) * count(n));
                mapped.write(0, all.as_bytes());
                Array(Place::Model(mapped, n, PhantomData))
            }
        }
    }

    /// Allocates `n` elements of zeros, which nobody has touched.
    pub(crate) fn zeroed<T: Element>(&self, n: usize) -> Array<T> {
        Array(match self {
            Self::Process => Place::Process(vec![T::new_zeroed(); n].into_boxed_slice()),
            Self::Model(space) => {
                let mapped = Mapped::new(space, count(size_of::<T>()) * count(n));
                Place::Model(mapped, n, PhantomData)
            }
        })
    }

    /// Allocates `n` words of zeros, all of them written.
    pub(crate) fn words(&self, n: usize) -> Words {
        match self {
            Self::Process => Words::Process((0..n).map(|_| AtomicU64::new(0)).collect()),
            Self::Model(space) => {
                let mapped = Mapped::new(space, count(n) * 8);
                mapped.write(0, vec![0_u64; n].as_bytes());
                Words::Model(mapped)
            }
        }
    }

    /// Maps all of a file, to be read.
    ///
    /// # Errors
    /// The system's; `InvalidInput` for what is no regular file or is empty.
    pub(crate) fn map(&self, path: &Path) -> io::Result<File> {
        let file = FileMapping::open(path)?;
        match self {
            Self::Process => Ok(File::Process(file)),
            Self::Model(space) => {
                let mut content = vec![0; file.len()];
                file.read(0, &mut content)?;
                Ok(File::Model(Mapped::file(space, &content), content.len()))
            }
        }
    }
}

/// A fixed number of elements in a row.
#[derive(Debug)]
pub(crate) struct Array<T>(Place<T>);

#[derive(Debug)]
enum Place<T> {
    Process(Box<[T]>),
    /// With the number of elements.
    Model(Mapped, usize, PhantomData<T>),
}

impl<T: Element> Array<T> {
    /// Number of elements.
    pub(crate) fn len(&self) -> usize {
        match &self.0 {
            Place::Process(all) => all.len(),
            Place::Model(_, n, _) => *n,
        }
    }

    /// Its address, for a device that only reads.
    pub(crate) fn address(&self) -> u64 {
        match &self.0 {
            Place::Process(all) => address_of(all),
            Place::Model(mapped, ..) => mapped.address(),
        }
    }

    /// Its address, for a device that writes.
    pub(crate) fn address_mut(&mut self) -> u64 {
        match &mut self.0 {
            Place::Process(all) => address_of_mut(all),
            Place::Model(mapped, ..) => mapped.address(),
        }
    }

    /// All elements, as the CPU sees them: in place, or loaded page by page.
    pub(crate) fn view(&self) -> Cow<'_, [T]> {
        match &self.0 {
            Place::Process(all) => Cow::Borrowed(all),
            Place::Model(mapped, n, _) => {
                let mut all = vec![T::new_zeroed(); *n];
                mapped.read(0, all.as_mut_bytes());
                Cow::Owned(all)
            }
        }
    }

    /// Lets the CPU change the elements: in place, or loaded before and stored afterwards.
    pub(crate) fn change(&mut self, act: impl FnOnce(&mut [T])) {
        if let Place::Process(all) = &mut self.0 {
            return act(all);
        }
        let mut all = self.view().into_owned();
        act(&mut all);
        if let Place::Model(mapped, ..) = &self.0 {
            mapped.write(0, all.as_bytes());
        }
    }
}

/// Elements of this process.
impl<T> From<Vec<T>> for Array<T> {
    fn from(all: Vec<T>) -> Self {
        Self(Place::Process(all.into_boxed_slice()))
    }
}

/// Words that CPU and device change at the same time, by atomics.
#[derive(Debug)]
pub(crate) enum Words {
    /// Of this process.
    Process(Box<[AtomicU64]>),
    /// Of a world.
    Model(Mapped),
}

impl Words {
    /// Their address.
    pub(crate) fn address(&self) -> u64 {
        match self {
            Self::Process(all) => address_of(all),
            Self::Model(mapped) => mapped.address(),
        }
    }

    /// The CPU adds to word `n`.
    pub(crate) fn add(&self, n: usize, by: u64) {
        match self {
            Self::Process(all) => {
                all[n].fetch_add(by, Ordering::Relaxed);
            }
            Self::Model(mapped) => mapped.add(count(n) * 8, by),
        }
    }

    /// Word `n`, loaded by the CPU.
    pub(crate) fn get(&self, n: usize) -> u64 {
        match self {
            Self::Process(all) => all[n].load(Ordering::Relaxed),
            Self::Model(mapped) => {
                let mut word = 0_u64;
                mapped.read(count(n) * 8, word.as_mut_bytes());
                word
            }
        }
    }
}

/// A file in memory, which is only read.
#[derive(Debug)]
pub(crate) enum File {
    /// Of this process.
    Process(FileMapping),
    /// Of a world, with its bytes.
    Model(Mapped, usize),
}

impl File {
    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Process(file) => file.len(),
            Self::Model(_, len) => *len,
        }
    }

    /// Its address.
    pub(crate) fn address(&self) -> u64 {
        match self {
            Self::Process(file) => file.address(),
            Self::Model(mapped, _) => mapped.address(),
        }
    }

    /// Copies bytes out, by the CPU.
    ///
    /// # Errors
    /// As [`FileMapping::read`].
    pub(crate) fn read(&self, from: usize, out: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Process(file) => file.read(from, out),
            Self::Model(mapped, _) => {
                mapped.read(count(from), out);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_in_place_and_change_in_place() {
        let mut array = Memory::Process.array(5, |i| count(i) * 3);
        let address = array.address();
        array.change(|all| all[4] = 7);
        assert_eq!(*array.view(), [0, 3, 6, 9, 7]);
        assert!(matches!(array.view(), Cow::Borrowed(_)));
        assert_eq!((array.address_mut(), array.len()), (address, 5));
        assert_eq!(*Memory::Process.zeroed::<u32>(2).view(), [0, 0]);
    }
}
