//! The host's CPU as an oracle: one instruction at a time in a page of its own, faults included.
//!
//! The stub is position-independent code in an arena in the low 2 GB, where 32-bit addresses reach the operands. It loads every register,
//! runs the instruction and stores every register. Behind the instruction is a jump back; everywhere else around it are INT3s, which tell
//! where a branch went. A fault arrives as a signal, whose handler notes it and resumes in the storing half of the stub. The way to the
//! instruction and the one back are far jumps, because it may run in a code segment of 32 or 16 bits (`mode.rs`).

use std::cell::Cell;

use softkvm_engine::cpu::CodeSize;
use softkvm_engine::state::rflags;

use super::arena::{
    arena, read_only, CONTEXT_PAGE, DATA_PAGE, DATA_PAGES, DATA_SIZE, PAGE, PAGES, READ_ONLY_PAGE, SLOT_OFFSET, SLOT_PAGE,
    SLOT_PAGE_OFFSET, STUB_PAGE,
};
use super::image::{Area, Fault, Image};
use super::mode::{Mode, Place, USER_CODE};

const MAX_LENGTH: usize = 15;
const LONGEST_JUMP: usize = 8;
const INT3: u8 = 0xcc;

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
    /// Operand of the jump to the instruction: its offset, and the selector of its code segment.
    target: u64,
    data_selector: u64,
    padding: [u64; 7],
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
    "mov eax, [rip + context + 192]",
    "mov ds, eax",
    "mov es, eax",
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
    "jmp fword ptr [rip + context + 184]",
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
        registers[libc::REG_CSGSFS as usize] = registers[libc::REG_CSGSFS as usize] & !0xffff | i64::from(USER_CODE);
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
    mode: Mode,
}

/// An entry of the LDT as modify_ldt(2) takes it.
#[repr(C)]
struct UserDescriptor {
    entry: u32,
    base: u32,
    limit: u32,
    flags: u32,
}

/// A 16-bit segment of 64 KB in the LDT of the process.
fn describe(place: Place, code: bool) {
    const WRITE: libc::c_long = 1;
    const CODE: u32 = 2 << 1;
    const USEABLE: u32 = 1 << 6;
    let flags = USEABLE | if code { CODE } else { 0 };
    let descriptor = UserDescriptor { entry: u32::from(place.selector >> 3), base: place.base as u32, limit: 0xffff, flags };
    // SAFETY: the kernel copies the descriptor; nobody uses the entry before.
    let result = unsafe { libc::syscall(libc::SYS_modify_ldt, WRITE, &raw const descriptor, size_of::<UserDescriptor>()) };
    assert_eq!(result, 0, "the kernel gives this process no LDT");
}

impl Oracle {
    /// An oracle for code of `size`; oracles that exist at the same time have different numbers.
    pub fn new(size: CodeSize, number: u16) -> Self {
        install_handlers();
        let everything = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let mode = Mode { size, arena: arena(number), number };
        if size == CodeSize::Bits16 {
            describe(mode.code(), true);
            describe(mode.data(), false);
        }
        let mut symbols = [0; 3];
        // SAFETY: a fresh mapping; the stub fits in its page and does not depend on where it is.
        unsafe {
            let arena = libc::mmap(mode.arena as *mut _, PAGES * PAGE, libc::PROT_NONE, flags, -1, 0);
            assert_eq!(arena as u64, mode.arena, "the arena's place is taken");
            let arena = arena.cast::<u8>();
            let protect = |page: usize, count: usize, rights| {
                assert_eq!(libc::mprotect(arena.add(page * PAGE).cast(), count * PAGE, rights), 0);
            };
            protect(STUB_PAGE, 2, everything);
            let slot = shared_page(arena.add(SLOT_PAGE * PAGE));
            protect(DATA_PAGE, DATA_PAGES, libc::PROT_READ | libc::PROT_WRITE);
            protect(READ_ONLY_PAGE, 1, libc::PROT_READ | libc::PROT_WRITE);
            arena.add(READ_ONLY_PAGE * PAGE).copy_from(read_only().as_ptr(), PAGE);
            protect(READ_ONLY_PAGE, 1, libc::PROT_READ);
            softkvm_oracle_symbols(&mut symbols);
            let [stub, store, end] = symbols;
            arena.copy_from(stub as *const u8, (end - stub) as usize);
            slot.write_bytes(INT3, PAGE);
            Oracle { arena, slot, store: arena as u64 + store - stub, length: 0, mode }
        }
    }

    fn page(&self, number: usize) -> *mut u8 {
        // SAFETY: the arena has that many pages.
        unsafe { self.arena.add(number * PAGE) }
    }

    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The operands.
    pub fn data(&mut self) -> &mut [u8] {
        // SAFETY: mapped, and the instruction under test runs only inside `run`, which borrows the oracle too.
        unsafe { std::slice::from_raw_parts_mut(self.page(DATA_PAGE), DATA_SIZE) }
    }

    /// Puts an instruction in place.
    pub fn load(&mut self, code: &[u8]) {
        assert!(code.len() <= MAX_LENGTH);
        let mut bytes = [INT3; MAX_LENGTH + LONGEST_JUMP];
        let back = self.way_back(code.len());
        bytes[..code.len()].copy_from_slice(code);
        bytes[code.len()..code.len() + back.len()].copy_from_slice(&back);
        // SAFETY: inside the slot page.
        unsafe { self.slot.add(SLOT_OFFSET).copy_from(bytes.as_ptr(), bytes.len()) };
        self.length = code.len();
    }

    /// Whether a branch to `rip` is one that does not come back, or not as itself: to the branch, or into the jump behind it.
    pub fn hides(&self, rip: u64) -> bool {
        let start = self.mode.slot();
        (start..start + (self.length + LONGEST_JUMP) as u64).contains(&rip) && rip != start + self.length as u64
    }

    /// Whether a page fault is at a page of the stub, which the host's CPU has and the guest's has not.
    pub fn is_stub(&self, fault: &Fault) -> bool {
        let stub = self.mode.arena..self.mode.arena + SLOT_PAGE_OFFSET;
        fault.vector == PF as u8 && stub.contains(&fault.address)
    }

    /// A jump from behind an instruction of `length` bytes to the storing half of the stub.
    fn way_back(&self, length: usize) -> Vec<u8> {
        const OPERAND_SIZE: u8 = 0x66;
        const JMP: u8 = 0xe9;
        const JMP_FAR: u8 = 0xea;
        let far = [&[JMP_FAR][..], &(self.store as u32).to_le_bytes(), &USER_CODE.to_le_bytes()].concat();
        match self.mode.size {
            CodeSize::Bits64 => {
                let distance = self.store as i64 - (self.mode.slot() as i64 + length as i64 + 5);
                [&[JMP][..], &(distance as i32).to_le_bytes()].concat()
            }
            CodeSize::Bits32 => far,
            CodeSize::Bits16 => [&[OPERAND_SIZE][..], &far].concat(),
        }
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
            (*context).target = self.mode.slot() | u64::from(self.mode.code().selector) << 32;
            (*context).data_selector = self.mode.data().selector.into();
            RUNNING.set((context, self.store));
            let stub: extern "sysv64" fn() = std::mem::transmute(self.arena);
            stub();
            RUNNING.set((std::ptr::null_mut(), 0));
            image.gpr = (*context).gpr.map(|register| register & self.mode.mask());
            image.rflags = (*context).rflags;
            image.area = (*context).area;
            image.area.normalize();
            (image.rip, image.fault) = self.outcome(&*context);
        }
    }

    fn outcome(&self, context: &Context) -> (u64, Option<Fault>) {
        if context.faulted == 0 {
            return (self.mode.slot() + self.length as u64, None);
        }
        let rip = self.mode.code().base + context.rip;
        let fetch = context.vector == PF && context.error & ERROR_FETCH != 0 && context.address == rip;
        match context.vector {
            BP => (context.rip - 1, None),
            // POPF set TF, which traps behind the jump back.
            DB if context.rip == self.store => (self.mode.slot() + self.length as u64, None),
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
