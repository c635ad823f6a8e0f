//! Proof that the notifier lock is held.

use core::marker::PhantomData;

/// Proof that the notifier lock of an [`Svm`](crate::svm::Svm) is held for `'a`. Only the
/// framework makes one; code that changes leaf entries asks for it.
#[derive(Debug)]
pub struct NotifierHeld<'a>(PhantomData<&'a ()>);

impl NotifierHeld<'_> {
    /// The caller holds the lock for the chosen lifetime.
    pub(crate) const fn new() -> Self {
        Self(PhantomData)
    }
}
