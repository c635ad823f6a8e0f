//! The entry that all stubs jump to, and the way from there to the hook.
//!
//! Registers on entry: `rax` the call's number, `rcx` where to go back, the call's arguments where
//! a system call has them. What the fast path needs beyond `rax`, `rcx` and `r11` goes below the
//! thread's red zone.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::sys::atfork;
use crate::sys::fault_copy;
use crate::sys::patch::{Call, HIGH, HOOK, IN_FLIGHT, LED, LOW, PARITY, PatchError};
use crate::sys::stack::{self, FIRST_TOP, FREE, STACK_SHIFT};

/// The call that sets a thread's signal mask, and what it can do.
const RT_SIGPROCMASK: i32 = 14;
const SIG_BLOCK: i32 = 0;
const SIG_SETMASK: i32 = 2;
/// All signals but SIGBUS (7) and SIGSEGV (11): a copy of the hook's may fault, and a blocked fault
/// kills.
#[unsafe(link_section = ".data")]
static ALL_BUT_FAULTS: AtomicU64 = AtomicU64::new(!(1 << 6 | 1 << 10));

/// Bytes that XSAVE needs.
#[unsafe(link_section = ".data")]
static XSAVE_BYTES: AtomicUsize = AtomicUsize::new(0);

/// A system call as its site made it. The entry builds it on the bracket's stack.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct SysCall {
    pub(super) number: usize,
    /// The arguments, in order.
    pub(crate) args: [usize; 6],
}

impl SysCall {
    /// Which call it is; `None` for a number that no stub passes on.
    pub(crate) const fn call(&self) -> Option<Call> {
        Call::from_number(self.number)
    }

    /// A call with these arguments, for tests of what calls mean.
    #[cfg(test)]
    pub(crate) fn new(call: Call, arguments: &[usize]) -> Self {
        let mut args = [0; 6];
        args[..arguments.len()].copy_from_slice(arguments);
        Self {
            number: usize::try_from(call.number()).expect("a small number"),
            args,
        }
    }

    /// A call of the runtime's own, or of a symbol.
    pub(in crate::sys) fn make(call: Call, args: [usize; 6]) -> Self {
        Self {
            number: usize::try_from(call.number()).unwrap_or(0),
            args,
        }
    }

    /// Makes the call by way of the hook where it concerns watched memory and calls are
    /// [led there](super::lead_calls); as [`raw`](Self::raw) elsewhere.
    pub(in crate::sys) fn bracketed(&self) -> isize {
        if !LED.load(Ordering::Acquire) {
            return self.raw();
        }
        // SAFETY: the entry expects what the function loads from the call, and stacks are prepared
        // before calls are led here.
        unsafe { gpusvm_bracketed_call(self) }
    }

    /// Makes the call. Negative results are errors.
    pub(crate) fn raw(&self) -> isize {
        let [a0, a1, a2, a3, a4, a5] = self.args;
        let result: isize;
        // SAFETY: exactly the call that the program made; its effects are the program's own. The
        // kernel changes rax, rcx and r11 only.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") self.number => result,
                in("rdi") a0, in("rsi") a1, in("rdx") a2, in("r10") a3, in("r8") a4, in("r9") a5,
                lateout("rcx") _, lateout("r11") _,
                options(nostack),
            );
        }
        result
    }
}

global_asm!(
    ".text",
    ".balign 64",
    ".globl gpusvm_bracket_entry",
    ".hidden gpusvm_bracket_entry",
    "gpusvm_bracket_entry:",
    "    lea rsp, [rsp - 128]",
    "    push rcx",
    "    mov r11, [rip + {parity}]",
    "    lea rcx, [rip + {in_flight}]",
    "    add rcx, r11",
    "    lock inc qword ptr [rcx]",
    "    push rcx",
    "    cmp eax, 9",
    "    je 2f",
    "    cmp eax, 10",
    "    je 3f",
    "    cmp eax, 11",
    "    je 3f",
    "    cmp eax, 28",
    "    je 3f",
    // All others: whenever anything is watched.
    "    cmp qword ptr [rip + {high}], 0",
    "    jne 5f",
    "    jmp 4f",
    // mmap: only with MAP_FIXED does it replace anything.
    "2:  test r10d, 0x10",
    "    jz 4f",
    // munmap, mprotect, madvise, mmap: does [rdi, rdi + rsi) meet the hull?
    "3:  cmp rdi, [rip + {high}]",
    "    jae 4f",
    "    lea r11, [rdi + rsi]",
    "    cmp r11, [rip + {low}]",
    "    ja 5f",
    // The fast path.
    "4:  syscall",
    "    pop rcx",
    "    lock dec qword ptr [rcx]",
    "    pop rcx",
    "    lea rsp, [rsp + 128]",
    "    jmp rcx",
    // The slow path: not in flight any more, for it may wait for those who are.
    "5:  pop rcx",
    "    lock dec qword ptr [rcx]",
    "    push rax",
    "    push rdi",
    "    push rsi",
    "    push rdx",
    "    push r10",
    "    push rax",
    // Signals wait from here on. The former mask goes where rsp points; its page may go away
    // between the store and the call, which then has to be made again.
    "9:  mov [rsp], rax",
    "    mov eax, {sigprocmask}",
    "    mov edi, {block}",
    "    xor esi, esi",
    "    mov rdx, rsp",
    "    mov r10d, 8",
    "    syscall",
    "    test eax, eax",
    "    jnz 9b",
    "    mov eax, {sigprocmask}",
    "    mov edi, {block}",
    "    lea rsi, [rip + {all_but_faults}]",
    "    xor edx, edx",
    "    mov r10d, 8",
    "    syscall",
    "    mov r10, [rsp + 8]",
    "    mov rdx, [rsp + 16]",
    "    mov rsi, [rsp + 24]",
    "    mov rdi, [rsp + 32]",
    "6:  mov rax, [rip + {free}]",
    "    test rax, rax",
    "    jz 7f",
    "    bsf rcx, rax",
    "    mov r11, rax",
    "    btr r11, rcx",
    "    lock cmpxchg [rip + {free}], r11",
    "    je 8f",
    "7:  pause",
    "    jmp 6b",
    // rcx is the number of a stack of ours.
    "8:  mov rax, rcx",
    "    shl rax, {shift}",
    "    add rax, [rip + {first_top}]",
    "    mov r11, rsp",
    "    mov rsp, rax",
    "    push r11",
    "    push rcx",
    "    push rbx",
    "    push r9",
    "    push r8",
    "    push r10",
    "    push rdx",
    "    push rsi",
    "    push rdi",
    "    push qword ptr [r11 + 40]",
    "    mov rbx, rsp",
    "    sub rsp, [rip + {xsave_bytes}]",
    "    and rsp, -64",
    // XSAVE leaves most of its header alone, and XRSTOR wants it zero.
    "    xor eax, eax",
    "    mov [rsp + 512], rax",
    "    mov [rsp + 520], rax",
    "    mov [rsp + 528], rax",
    "    mov [rsp + 536], rax",
    "    mov [rsp + 544], rax",
    "    mov [rsp + 552], rax",
    "    mov [rsp + 560], rax",
    "    mov [rsp + 568], rax",
    "    mov eax, -1",
    "    mov edx, -1",
    "    xsave64 [rsp]",
    "    cld",
    "    mov rdi, rbx",
    "    call {dispatch}",
    "    mov [rbx], rax",
    "    mov eax, -1",
    "    mov edx, -1",
    "    xrstor64 [rsp]",
    "    mov rsp, rbx",
    "    pop rax",
    "    pop rdi",
    "    pop rsi",
    "    pop rdx",
    "    pop r10",
    "    pop r8",
    "    pop r9",
    "    pop rbx",
    "    pop rcx",
    "    mov rsp, [rsp]",
    "    lock bts [rip + {free}], rcx",
    // On the thread's own stack again, where signals that waited are handled: such a handler may
    // need more room than a bracket's stack has, and may never return.
    "    mov [rsp + 40], rax",
    "12: mov rax, [rsp]",
    "    mov [rsp], rax",
    "    mov eax, {sigprocmask}",
    "    mov edi, {set}",
    "    mov rsi, rsp",
    "    xor edx, edx",
    "    mov r10d, 8",
    "    syscall",
    "    test eax, eax",
    "    jnz 12b",
    "    pop rcx",
    "    pop r10",
    "    pop rdx",
    "    pop rsi",
    "    pop rdi",
    "    pop rax",
    "    pop rcx",
    "    lea rsp, [rsp + 128]",
    "    jmp rcx",
    // A call with its arguments behind rdi: as a stub, with the next instruction to come back to.
    ".globl gpusvm_bracketed_call",
    ".hidden gpusvm_bracketed_call",
    "gpusvm_bracketed_call:",
    "    mov rax, [rdi]",
    "    mov rsi, [rdi + 16]",
    "    mov rdx, [rdi + 24]",
    "    mov r10, [rdi + 32]",
    "    mov r8, [rdi + 40]",
    "    mov r9, [rdi + 48]",
    "    mov rdi, [rdi + 8]",
    "    lea rcx, [rip + 14f]",
    "    jmp gpusvm_bracket_entry",
    "14: ret",
    parity = sym PARITY,
    in_flight = sym IN_FLIGHT,
    low = sym LOW,
    high = sym HIGH,
    free = sym FREE,
    first_top = sym FIRST_TOP,
    xsave_bytes = sym XSAVE_BYTES,
    shift = const STACK_SHIFT,
    sigprocmask = const RT_SIGPROCMASK,
    block = const SIG_BLOCK,
    set = const SIG_SETMASK,
    all_but_faults = sym ALL_BUT_FAULTS,
    dispatch = sym dispatch,
);

unsafe extern "C" {
    fn gpusvm_bracket_entry();
    fn gpusvm_bracketed_call(call: *const SysCall) -> isize;
}

/// Address of the entry.
pub(super) fn address() -> u64 {
    u64::try_from(gpusvm_bracket_entry as unsafe extern "C" fn() as usize).unwrap_or(0)
}

/// Maps the stacks and measures the register state. Once per process.
pub(super) fn prepare() -> Result<(), PatchError> {
    fault_copy::install();
    atfork::tell_copies_apart();
    if !std::is_x86_feature_detected!("xsave") {
        return Err(PatchError::NoXsave);
    }
    let state = core::arch::x86_64::__cpuid_count(0xD, 0);
    XSAVE_BYTES.store(
        usize::try_from(state.ebx).unwrap_or(4096),
        Ordering::Relaxed,
    );
    stack::prepare().map_err(|errno| PatchError::Os {
        step: "map bracket stacks",
        errno,
    })
}

/// Called by the entry, on a bracket's stack, with all registers saved. What a child does to its memory
/// concerns nobody.
extern "C" fn dispatch(call: &SysCall) -> isize {
    let hook = HOOK.get().filter(|_| !atfork::is_child());
    hook.map_or_else(|| call.raw(), |hook| hook.call(call))
}
