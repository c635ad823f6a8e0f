//! How deep a thread is in the runtime: one thread-local number, at a fixed distance from the
//! thread pointer.
//!
//! The language's own thread-locals are found through a table per thread wherever the runtime is
//! part of a shared library, and the C library keeps that table on its heap: the very memory that
//! migrates. A thread that serves faults would wait for itself there. So the number is declared in
//! the *initial-exec* model, in which no memory is looked at but the thread's own block and the
//! library's relocations, which are mapped from a file and stay.
//!
//! A library with such a thread-local is loaded with the program, or by `dlopen` where the dynamic
//! linker has room to spare for eight bytes, which it has.

use core::arch::{asm, global_asm};

global_asm!(
    ".section .tbss.gpusvm_runtime_depth, \"awT\", @nobits",
    ".balign 8",
    ".globl gpusvm_runtime_depth",
    ".hidden gpusvm_runtime_depth",
    ".type gpusvm_runtime_depth, @object",
    ".size gpusvm_runtime_depth, 8",
    "gpusvm_runtime_depth:",
    ".zero 8",
    ".text",
);

/// The number of the calling thread; 0 at its start.
pub(crate) fn get() -> u64 {
    let depth: u64;
    // SAFETY: reads the linker's offset of a thread-local of eight bytes, and that thread-local,
    // which exists in every thread from its start to its end.
    unsafe {
        asm!(
            "mov {at}, qword ptr [rip + gpusvm_runtime_depth@GOTTPOFF]",
            "mov {depth}, qword ptr fs:[{at}]",
            at = out(reg) _,
            depth = out(reg) depth,
            options(nostack, preserves_flags, readonly),
        );
    }
    depth
}

/// Adds `by` to the number of the calling thread, in one instruction.
pub(crate) fn add(by: i64) {
    // SAFETY: as in `get`; nobody else writes the number, and it has no other user.
    unsafe {
        asm!(
            "mov {at}, qword ptr [rip + gpusvm_runtime_depth@GOTTPOFF]",
            "add qword ptr fs:[{at}], {by}",
            at = out(reg) _,
            by = in(reg) by,
            options(nostack),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_counts_for_itself() {
        let before = get();
        add(2);
        let other = std::thread::scope(|scope| {
            let count = scope.spawn(|| {
                add(5);
                get()
            });
            count.join().expect("it counts")
        });
        assert_eq!((get(), other), (before + 2, 5));
        add(-2);
        assert_eq!(get(), before);
    }
}
