//! The host's CPU as an oracle: one instruction at a time in a page of its own, faults included.
//!
//! The stub is position-independent code in an arena in the low 2 GB, where 32-bit addresses reach the operands. It loads every register,
//! runs the instruction and stores every register. Behind the instruction is a jump back; everywhere else around it are INT3s, which tell
//! where a branch went. A fault arrives as a signal, whose handler notes it and resumes in the storing half of the stub.

use std::cell::Cell;

use softkvm_engine::state::rflags;

use super::image::{Area, Fault, Image};

const PAGE: usize = 4096;
/// Pages of the arena by purpose; those not named are guards.
const STUB_PAGE: usize = 0;
const CONTEXT_PAGE: usize = 1;
const SLOT_PAGE: usize = 2;
const DATA_PAGE: usize = 4;
const READ_ONLY_PAGE: usize = 7;
const PAGES: usize = 9;
const MAX_LENGTH: usize = 15;
const INT3: u8 = 0xcc;

/// Pages of operands that can be written.
pub const DATA_PAGES: usize = 2;
/// Bytes of operands that can be written.
pub const DATA_SIZE: usize = DATA_PAGES * PAGE;
/// Where in its page the instruction is.
pub const SLOT_OFFSET: usize = 0x400;

#[repr(C, align(64))]
struct Context {
    gpr: [u64; 16],
    rflags: u64,
    rip: u64,
    stack: u64,
    faulted: u64,
    vector: u64,
    error: u64,
    address: u64,
    padding: [u64; 9],
    area: Area,
}

const _: () = assert!(std::mem::offset_of!(Context, area) == 256);

core::arch::global_asm!(
    ".balign 64",
    "softkvm_oracle_stub:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    ".set context, softkvm_oracle_stub + 0x1000",
    "mov [rip + context + 144], rsp",
    "mov eax, 7",
    "xor edx, edx",
    "xrstor64 [rip + context + 256]",
    "push qword ptr [rip + context + 128]",
    "popfq",
    "mov rax, [rip + context]",
    "mov rcx, [rip + context + 8]",
    "mov rdx, [rip + context + 16]",
    "mov rbx, [rip + context + 24]",
    "mov rsp, [rip + context + 32]",
    "mov rbp, [rip + context + 40]",
    "mov rsi, [rip + context + 48]",
    "mov rdi, [rip + context + 56]",
    "mov r8, [rip + context + 64]",
    "mov r9, [rip + context + 72]",
    "mov r10, [rip + context + 80]",
    "mov r11, [rip + context + 88]",
    "mov r12, [rip + context + 96]",
    "mov r13, [rip + context + 104]",
    "mov r14, [rip + context + 112]",
    "mov r15, [rip + context + 120]",
    "jmp softkvm_oracle_stub + 0x2400",
    "softkvm_oracle_store:",
    "mov [rip + context], rax",
    "mov [rip + context + 8], rcx",
    "mov [rip + context + 16], rdx",
    "mov [rip + context + 24], rbx",
    "mov [rip + context + 32], rsp",
    "mov [rip + context + 40], rbp",
    "mov [rip + context + 48], rsi",
    "mov [rip + context + 56], rdi",
    "mov [rip + context + 64], r8",
    "mov [rip + context + 72], r9",
    "mov [rip + context + 80], r10",
    "mov [rip + context + 88], r11",
    "mov [rip + context + 96], r12",
    "mov [rip + context + 104], r13",
    "mov [rip + context + 112], r14",
    "mov [rip + context + 120], r15",
    "mov rsp, [rip + context + 144]",
    "pushfq",
    "pop qword ptr [rip + context + 128]",
    "push 0x202",
    "popfq",
    "mov eax, 7",
    "xor edx, edx",
    "xsave64 [rip + context + 256]",
    "fninit",
    "push 0x1f80",
    "ldmxcsr [rsp]",
    "pop rax",
    "vzeroupper",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    "softkvm_oracle_end:",
    ".globl softkvm_oracle_symbols",
    "softkvm_oracle_symbols:",
    "lea rax, [rip + softkvm_oracle_stub]",
    "lea rdx, [rip + softkvm_oracle_store]",
    "mov [rdi], rax",
    "mov [rdi + 8], rdx",
    "lea rax, [rip + softkvm_oracle_end]",
    "mov [rdi + 16], rax",
    "ret",
);

extern "sysv64" {
    /// Stores the addresses of the stub, of its storing half and of its end.
    fn softkvm_oracle_symbols(symbols: *mut [u64; 3]);
}

thread_local! {
    /// Where the handler notes a fault, and where it goes on: the thread's running oracle.
    static RUNNING: Cell<(*mut Context, u64)> = const { Cell::new((std::ptr::null_mut(), 0)) };
}

const SIGNALS: [libc::c_int; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP];
const PF: u64 = 14;
const DB: u64 = 1;
const BP: u64 = 3;
const ERROR_FETCH: u64 = 16;

extern "C" fn on_signal(signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let (noted, resume) = RUNNING.get();
    if noted.is_null() {
        // Not ours: the default action takes over when the instruction faults again.
        // SAFETY: plain system call.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    // SAFETY: the kernel passes a ucontext; the oracle of this thread runs, so its context is alive.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        (*noted).faulted = 1;
        (*noted).rip = registers[libc::REG_RIP as usize] as u64;
        (*noted).vector = registers[libc::REG_TRAPNO as usize] as u64;
        (*noted).error = registers[libc::REG_ERR as usize] as u64;
        (*noted).address = registers[libc::REG_CR2 as usize] as u64;
        registers[libc::REG_RIP as usize] = resume as i64;
        registers[libc::REG_EFL as usize] &= !(rflags::TF as i64);
    }
}

fn install_handlers() {
    const STACK: usize = 256 << 10;
    let stack = Box::leak(vec![0u8; STACK].into_boxed_slice());
    let alternative = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: STACK };
    // SAFETY: the stack lives for ever, and the handler is async-signal-safe.
    unsafe {
        assert_eq!(libc::sigaltstack(&alternative, std::ptr::null_mut()), 0);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in SIGNALS {
            assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
        }
    }
}

/// Maps a fresh page at `at` to be executed, and again to be written: the second address.
///
/// # Safety
/// Nothing else may use the page at `at`.
unsafe fn shared_page(at: *mut u8) -> *mut u8 {
    let (read, write, execute) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
    // SAFETY: a new file; the first mapping replaces a page that the caller owns, the second is anywhere.
    unsafe {
        let file = libc::memfd_create(c"softkvm-oracle".as_ptr(), libc::MFD_CLOEXEC);
        assert!(file >= 0 && libc::ftruncate(file, PAGE as i64) == 0);
        let fixed = libc::mmap(at.cast(), PAGE, read | execute, libc::MAP_SHARED | libc::MAP_FIXED, file, 0);
        let alias = libc::mmap(std::ptr::null_mut(), PAGE, read | write, libc::MAP_SHARED, file, 0);
        assert!(fixed != libc::MAP_FAILED && alias != libc::MAP_FAILED);
        libc::close(file);
        alias.cast()
    }
}

/// The host's CPU, for the thread that made it.
pub struct Oracle {
    arena: *mut u8,
    /// The slot page where it can be written: instructions under test cannot.
    slot: *mut u8,
    store: u64,
    length: usize,
}

impl Oracle {
    pub fn new() -> Self {
        install_handlers();
        let everything = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
        let mut symbols = [0; 3];
        // SAFETY: a fresh mapping; the stub fits in its page and does not depend on where it is.
        unsafe {
            let arena = libc::mmap(std::ptr::null_mut(), PAGES * PAGE, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(arena, libc::MAP_FAILED);
            let arena = arena.cast::<u8>();
            let protect = |page: usize, count: usize, rights| {
                assert_eq!(libc::mprotect(arena.add(page * PAGE).cast(), count * PAGE, rights), 0);
            };
            protect(STUB_PAGE, 2, everything);
            let slot = shared_page(arena.add(SLOT_PAGE * PAGE));
            protect(DATA_PAGE, DATA_PAGES, libc::PROT_READ | libc::PROT_WRITE);
            protect(READ_ONLY_PAGE, 1, libc::PROT_READ | libc::PROT_WRITE);
            for at in (0..PAGE).step_by(8) {
                arena.add(READ_ONLY_PAGE * PAGE + at).cast::<u64>().write((at as u64).wrapping_mul(0x0102_0408_1020_4081));
            }
            protect(READ_ONLY_PAGE, 1, libc::PROT_READ);
            softkvm_oracle_symbols(&mut symbols);
            let [stub, store, end] = symbols;
            arena.copy_from(stub as *const u8, (end - stub) as usize);
            slot.write_bytes(INT3, PAGE);
            Oracle { arena, slot, store: arena as u64 + store - stub, length: 0 }
        }
    }

    fn page(&self, number: usize) -> *mut u8 {
        // SAFETY: the arena has that many pages.
        unsafe { self.arena.add(number * PAGE) }
    }

    /// Linear address of the instruction.
    pub fn slot(&self) -> u64 {
        self.page(SLOT_PAGE) as u64 + SLOT_OFFSET as u64
    }

    /// Linear address of the operands.
    pub fn data_address(&self) -> u64 {
        self.page(DATA_PAGE) as u64
    }

    /// Linear address of operands that can only be read.
    pub fn read_only_address(&self) -> u64 {
        self.page(READ_ONLY_PAGE) as u64
    }

    /// The operands.
    pub fn data(&mut self) -> &mut [u8] {
        // SAFETY: mapped, and the instruction under test runs only inside `run`, which borrows the oracle too.
        unsafe { std::slice::from_raw_parts_mut(self.page(DATA_PAGE), DATA_SIZE) }
    }

    /// Contents of the page that can only be read.
    pub fn read_only(&self) -> &[u8] {
        // SAFETY: mapped, and never written after `new`.
        unsafe { std::slice::from_raw_parts(self.page(READ_ONLY_PAGE), PAGE) }
    }

    /// Puts an instruction in place.
    pub fn load(&mut self, code: &[u8]) {
        assert!(code.len() <= MAX_LENGTH);
        let back = (self.store as i64 - (self.slot() as i64 + code.len() as i64 + 5)) as i32;
        // SAFETY: inside the slot page.
        unsafe {
            let slot = self.slot.add(SLOT_OFFSET);
            slot.write_bytes(INT3, MAX_LENGTH + 5);
            slot.copy_from(code.as_ptr(), code.len());
            slot.add(code.len()).write(0xe9);
            slot.add(code.len() + 1).cast::<i32>().write_unaligned(back);
        }
        self.length = code.len();
    }

    /// Runs the instruction with the registers of `image`, which become those behind it.
    pub fn run(&mut self, image: &mut Image) {
        let context = self.page(CONTEXT_PAGE).cast::<Context>();
        // SAFETY: the context page is ours; the stub saves what the calling convention asks for, whatever the instruction does.
        unsafe {
            (*context).gpr = image.gpr;
            (*context).rflags = image.rflags;
            (*context).area = image.area;
            (*context).faulted = 0;
            RUNNING.set((context, self.store));
            let stub: extern "sysv64" fn() = std::mem::transmute(self.arena);
            stub();
            RUNNING.set((std::ptr::null_mut(), 0));
            image.gpr = (*context).gpr;
            image.rflags = (*context).rflags;
            image.area = (*context).area;
            image.area.normalize();
            (image.rip, image.fault) = self.outcome(&*context);
        }
    }

    fn outcome(&self, context: &Context) -> (u64, Option<Fault>) {
        if context.faulted == 0 {
            return (self.slot() + self.length as u64, None);
        }
        let fetch = context.vector == PF && context.error & ERROR_FETCH != 0 && context.address == context.rip;
        match context.vector {
            BP => (context.rip - 1, None),
            // POPF set TF, which traps behind the jump back.
            DB if context.rip == self.store => (self.slot() + self.length as u64, None),
            _ if fetch => (context.rip, None),
            vector => {
                let address = if vector == PF { context.address } else { 0 };
                (context.rip, Some(Fault { vector: vector as u8, error: context.error as u32, address }))
            }
        }
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made.
        unsafe {
            libc::munmap(self.arena.cast(), PAGES * PAGE);
            libc::munmap(self.slot.cast(), PAGE);
        }
    }
}
