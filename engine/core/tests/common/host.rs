//! The same instruction on the host's CPU and on ours.

use softkvm_engine::state::{gpr, rflags};

use super::{Machine, Random, DATA, DATA_SIZE};

/// General registers and flags around one instruction.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    pub gpr: [u64; 16],
    pub rflags: u64,
}

/// Flags that a comparison looks at.
pub const FLAGS: u64 = rflags::ARITHMETIC | rflags::DF;

core::arch::global_asm!(
    // fn(registers: rdi, code: rsi): loads all registers but RSP, calls `code`, stores them.
    ".globl softkvm_test_host_run",
    "softkvm_test_host_run:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "push rdi",
    "push rsi",
    "push qword ptr [rdi + 128]",
    "popfq",
    "mov rax, [rdi]",
    "mov rcx, [rdi + 8]",
    "mov rdx, [rdi + 16]",
    "mov rbx, [rdi + 24]",
    "mov rbp, [rdi + 40]",
    "mov rsi, [rdi + 48]",
    "mov r8, [rdi + 64]",
    "mov r9, [rdi + 72]",
    "mov r10, [rdi + 80]",
    "mov r11, [rdi + 88]",
    "mov r12, [rdi + 96]",
    "mov r13, [rdi + 104]",
    "mov r14, [rdi + 112]",
    "mov r15, [rdi + 120]",
    "mov rdi, [rdi + 56]",
    "call [rsp]",
    "xchg rdi, [rsp + 8]",
    "mov [rdi], rax",
    "mov [rdi + 8], rcx",
    "mov [rdi + 16], rdx",
    "mov [rdi + 24], rbx",
    "mov [rdi + 40], rbp",
    "mov [rdi + 48], rsi",
    "mov [rdi + 64], r8",
    "mov [rdi + 72], r9",
    "mov [rdi + 80], r10",
    "mov [rdi + 88], r11",
    "mov [rdi + 96], r12",
    "mov [rdi + 104], r13",
    "mov [rdi + 112], r14",
    "mov [rdi + 120], r15",
    "pushfq",
    "pop qword ptr [rdi + 128]",
    "cld",
    "pop rsi",
    "pop rax",
    "mov [rdi + 56], rax",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
);

extern "sysv64" {
    fn softkvm_test_host_run(registers: *mut Registers, code: *const u8);
}

/// A page of host memory to run instructions from.
struct Stub(*mut u8);

impl Stub {
    fn new() -> Self {
        let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        // SAFETY: a fresh anonymous mapping cannot alias anything.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, prot, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0) };
        assert_ne!(page, libc::MAP_FAILED);
        Stub(page.cast())
    }

    fn run(&mut self, code: &[u8], registers: &mut Registers) {
        assert!(code.len() < 128);
        // SAFETY: the page is ours, and the tests write only instructions that touch the test data and fall through to RET.
        unsafe {
            self.0.copy_from(code.as_ptr(), code.len());
            self.0.add(code.len()).write(0xc3);
            softkvm_test_host_run(registers, self.0);
        }
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made.
        unsafe { libc::munmap(self.0.cast(), 4096) };
    }
}

/// Runs instructions on both CPUs and compares registers, flags and the test data.
pub struct Comparison {
    pub machine: Machine,
    pub random: Random,
    stub: Stub,
}

impl Comparison {
    pub fn new(seed: u64) -> Self {
        Comparison { machine: Machine::new(), random: Random::new(seed), stub: Stub::new() }
    }

    /// Random operands in every register but RSP, random arithmetic flags.
    pub fn registers(&mut self) -> Registers {
        let mut registers =
            Registers { rflags: self.random.next() & rflags::ARITHMETIC | rflags::FIXED | rflags::IF, ..Default::default() };
        for number in 0..16 {
            registers.gpr[number] = self.random.operand();
        }
        registers.gpr[gpr::RSP] = super::STACK_TOP;
        registers
    }

    /// Runs `code`, one instruction, with `registers` on both CPUs. Flags outside `defined` are not compared.
    pub fn check(&mut self, code: &[u8], registers: Registers, defined: u64) {
        let image: Vec<u8> = (0..DATA_SIZE / 8).flat_map(|_| self.random.operand().to_le_bytes()).collect();
        self.check_with_data(code, registers, defined, &image);
    }

    /// [`Comparison::check`] with the given test data.
    pub fn check_with_data(&mut self, code: &[u8], registers: Registers, defined: u64, image: &[u8]) {
        self.check_program(code, 1, registers, defined, image);
    }

    /// [`Comparison::check_with_data`] with `count` instructions.
    pub fn check_program(&mut self, code: &[u8], count: usize, registers: Registers, defined: u64, image: &[u8]) {
        self.machine.poke(DATA, image);
        let mut expected = registers;
        self.stub.run(code, &mut expected);
        expected.gpr[gpr::RSP] = registers.gpr[gpr::RSP];
        let expected_data = self.machine.peek(DATA, DATA_SIZE);

        self.machine.poke(DATA, image);
        self.machine.cpu.regs[..16].copy_from_slice(&registers.gpr);
        self.machine.set_flags(registers.rflags);
        let outcome = self.machine.run(code, count);
        assert!(outcome.is_ok(), "{code:02x?} {registers:x?}: {outcome:?}, vector {}", self.machine.vector());
        let mut found = Registers { rflags: self.machine.cpu.rflags(), ..Default::default() };
        found.gpr.copy_from_slice(&self.machine.cpu.regs[..16]);
        assert_eq!(found.gpr, expected.gpr, "registers (found, expected by the host) of {code:02x?} with {registers:x?}");
        let mask = FLAGS & defined;
        assert_eq!(found.rflags & mask, expected.rflags & mask, "flags (found, expected by the host) of {code:02x?} with {registers:x?}");
        let data = self.machine.peek(DATA, DATA_SIZE);
        let differences: Vec<_> =
            (0..DATA_SIZE).filter(|n| data[*n] != expected_data[*n]).map(|n| (n, data[n], expected_data[n])).collect();
        assert!(differences.is_empty(), "memory (place, found, expected) of {code:02x?} with {registers:x?}: {differences:x?}");
    }

    /// Checks an instruction with a ModRM byte: every operand size, random registers and memory operands, `count` times each.
    /// `sizes` are bits: 1 as is (32-bit, or 8-bit opcodes), 2 with 66, 4 with REX.W. The memory operand is `[rsi + disp32]`.
    pub fn check_modrm(&mut self, form: &Form, count: usize) {
        for size in [1, 2, 4] {
            if form.sizes & size == 0 {
                continue;
            }
            for _ in 0..count {
                let mut registers = self.registers();
                registers.gpr[gpr::RSI] = self.machine.data() + 0x1000;
                if let Some(count) = form.rcx {
                    registers.gpr[gpr::RCX] = self.random.below(count);
                }
                let code = self.encode(form, size);
                self.check(&code, registers, form.defined);
            }
        }
    }

    fn encode(&mut self, form: &Form, size: u8) -> Vec<u8> {
        let memory = form.lock || form.memory_only || form.memory && self.random.below(2) == 0;
        let mut code = Vec::new();
        if form.lock {
            code.push(0xf0);
        }
        if size == 2 {
            code.push(0x66);
        }
        code.extend(form.prefix);
        let reg = form.extension.unwrap_or_else(|| self.register());
        let rm = if memory { 6 } else { self.register() };
        let rex = 0x40 | if size == 4 { 8 } else { 0 } | if form.extension.is_none() { reg >> 3 << 2 } else { 0 } | rm >> 3;
        if rex != 0x40 || self.random.below(2) == 0 {
            code.push(rex);
        }
        code.extend(form.opcode);
        code.push(if memory { 0x80 } else { 0xc0 } | (reg & 7) << 3 | rm & 7);
        if memory {
            code.extend((self.random.below(64) as u32).to_le_bytes());
        }
        let immediate = match form.immediate {
            Immediate::None => 0,
            Immediate::Byte => 1,
            Immediate::Word if size == 2 => 2,
            Immediate::Word => 4,
        };
        let value = self.random.operand().to_le_bytes();
        code.extend(&value[..immediate]);
        code
    }

    /// A register that is neither RSP nor the base of memory operands.
    fn register(&mut self) -> u8 {
        loop {
            let number = self.random.below(16) as u8;
            if number != 4 && number != 6 {
                return number;
            }
        }
    }
}

/// Immediate operand of an encoding.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Immediate {
    None,
    Byte,
    /// As wide as the operand, but at most 32 bits.
    Word,
}

/// How an instruction with a ModRM byte is encoded and compared.
#[derive(Clone, Copy)]
pub struct Form {
    pub prefix: &'static [u8],
    pub opcode: &'static [u8],
    /// ModRM.reg where it is part of the opcode.
    pub extension: Option<u8>,
    pub sizes: u8,
    pub memory: bool,
    pub memory_only: bool,
    pub lock: bool,
    pub immediate: Immediate,
    /// Flags that the instruction defines, or leaves as they were.
    pub defined: u64,
    /// RCX is below this instead of random.
    pub rcx: Option<u64>,
}

impl Form {
    /// All sizes, register or memory, no immediate, every flag defined.
    pub const fn new(opcode: &'static [u8]) -> Self {
        Form {
            prefix: &[],
            opcode,
            extension: None,
            sizes: 7,
            memory: true,
            memory_only: false,
            lock: false,
            immediate: Immediate::None,
            defined: u64::MAX,
            rcx: None,
        }
    }
}
