//! Unicorn as the second oracle: QEMU's translator as a library, which shares no code with the engine and none with the host's CPU.
//!
//! The library is loaded at run time from `SOFTKVM_DIFFERENTIAL_UNICORN` (`make differential` finds it in the PyPI package `unicorn`), so
//! nothing of it is linked. API as in `unicorn/unicorn.h` and `unicorn/x86.h` of version 2. It runs the same instruction at the same
//! addresses, but as a kernel without paging, so a comparison is made where the host raises no exception. Unicorn 2 is QEMU 5.0: it has no
//! AVX, keeps no exception flags of x87 and MXCSR, and is no authority on undefined flags; [`Unicorn::compare`] leaves these out, and where it
//! still differs from engine and host, which are then the same, the host decides.

use std::ffi::{c_int, c_void, CStr, CString};

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind};
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::state::rflags;

use super::arena::{read_only, DATA_OFFSET, DATA_SIZE, READ_ONLY_OFFSET, SLOT_OFFSET, SLOT_PAGE_OFFSET};
use super::encode::Encoded;
use super::explained::{comparison, is_x87, undefined};
use super::forms::family;
use super::image::{Fault, Image};
use super::mode::Mode;

const PAGE: usize = 4096;
const ARCH_X86: c_int = 4;
const MODE_32: c_int = 4;
const MODE_64: c_int = 8;
const PROT_READ: u32 = 1;
const PROT_WRITE: u32 = 2;
const PROT_EXECUTE: u32 = 4;
const FETCH_UNMAPPED: c_int = 8;
const INVALID_INSTRUCTION: c_int = 10;
const FETCH_PROTECTED: c_int = 14;
/// `UC_CTL_WRITE(UC_CTL_CPU_MODEL, 1)` and its newest model with everything that QEMU 5.0 translates.
const SET_CPU_MODEL: c_int = 7 | 1 << 26 | 1 << 30;
const ICELAKE_SERVER: c_int = 26;
/// Ends a run wherever a branch goes: a kernel's HLT.
const HLT: u8 = 0xf4;

const GPR_64: [c_int; 16] = [35, 38, 40, 37, 44, 36, 43, 39, 106, 107, 108, 109, 110, 111, 112, 113];
const GPR_32: [c_int; 8] = [19, 22, 24, 21, 30, 20, 29, 23];
const RIP_64: c_int = 41;
const RIP_32: c_int = 26;
const EFLAGS: c_int = 25;
const FPSW: c_int = 31;
const FPCW: c_int = 246;
const FPTAG: c_int = 247;
const MXCSR: c_int = 249;
const FP0: c_int = 82;
const XMM0: c_int = 122;

/// MXCSR and FSW: exception flags. FSW: summary, stack fault, busy, and the condition codes.
const EXCEPTIONS: u32 = 0x3f;
const TOP: u16 = 0x3800;
const STACK_FAULT: u16 = 0x40;
const SUMMARY: u16 = 0x80;
const MASKS: u16 = 0x3f;
const CONDITIONS: u16 = 0x4500;

type Engine = *mut c_void;

/// The functions of the library.
#[derive(Clone, Copy)]
struct Api {
    open: unsafe extern "C" fn(c_int, c_int, *mut Engine) -> c_int,
    close: unsafe extern "C" fn(Engine) -> c_int,
    control: unsafe extern "C" fn(Engine, c_int, ...) -> c_int,
    map_ptr: unsafe extern "C" fn(Engine, u64, usize, u32, *mut c_void) -> c_int,
    map: unsafe extern "C" fn(Engine, u64, usize, u32) -> c_int,
    write: unsafe extern "C" fn(Engine, u64, *const c_void, usize) -> c_int,
    registers_read: unsafe extern "C" fn(Engine, *const c_int, *const *mut c_void, c_int) -> c_int,
    registers_write: unsafe extern "C" fn(Engine, *const c_int, *const *mut c_void, c_int) -> c_int,
    start: unsafe extern "C" fn(Engine, u64, u64, u64, usize) -> c_int,
}

impl Api {
    fn load(path: &str) -> Self {
        let name = CString::new(path).expect("a path without NUL");
        // SAFETY: loading runs the library's initialisers, which is what the caller asks for; the types are those of unicorn.h.
        unsafe {
            let library = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
            assert!(!library.is_null(), "cannot load {path}");
            Api {
                open: symbol(library, c"uc_open"),
                close: symbol(library, c"uc_close"),
                control: symbol(library, c"uc_ctl"),
                map_ptr: symbol(library, c"uc_mem_map_ptr"),
                map: symbol(library, c"uc_mem_map"),
                write: symbol(library, c"uc_mem_write"),
                registers_read: symbol(library, c"uc_reg_read_batch"),
                registers_write: symbol(library, c"uc_reg_write_batch"),
                start: symbol(library, c"uc_emu_start"),
            }
        }
    }
}

/// The function `name` of a library that stays loaded.
///
/// # Safety
/// `F` must be the function's type.
unsafe fn symbol<F: Copy>(library: *mut c_void, name: &CStr) -> F {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: a loaded library; the address is not null, and of a function of type `F` by the caller's promise.
    unsafe {
        let address = libc::dlsym(library, name.as_ptr());
        assert!(!address.is_null(), "the library has no {name:?}");
        std::mem::transmute_copy(&address)
    }
}

/// What a run came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Agrees,
    Differs,
    /// Unicorn does not know the instruction.
    Lacks,
}

/// Every register that a comparison looks at, as the batch functions take them: 16 bytes each.
#[derive(Default)]
struct Registers {
    numbers: Vec<c_int>,
    values: Vec<[u8; 16]>,
}

impl Registers {
    fn push(&mut self, number: c_int, value: &[u8]) {
        let mut bytes = [0; 16];
        bytes[..value.len()].copy_from_slice(value);
        self.numbers.push(number);
        self.values.push(bytes);
    }

    fn places(&mut self) -> Vec<*mut c_void> {
        self.values.iter_mut().map(|value| value.as_mut_ptr().cast()).collect()
    }

    /// The next value of those that were read.
    fn take<'a>(values: &mut impl Iterator<Item = &'a [u8; 16]>) -> u128 {
        u128::from_le_bytes(*values.next().expect("as many registers as were asked for"))
    }
}

/// One emulator, for the thread that made it.
pub struct Unicorn {
    api: Api,
    engine: Engine,
    mode: Mode,
    /// The operands, which Unicorn uses in place.
    data: Box<[u8]>,
    end: u64,
}

impl Unicorn {
    /// An emulator of the library at `path` for code of `mode`; `None` for 16-bit code, whose segments it cannot have without paging.
    pub fn new(path: &str, mode: Mode) -> Option<Self> {
        let kind = match mode.size {
            CodeSize::Bits64 => MODE_64,
            CodeSize::Bits32 => MODE_32,
            CodeSize::Bits16 => return None,
        };
        let api = Api::load(path);
        let mut data = vec![0; DATA_SIZE].into_boxed_slice();
        let mut engine = std::ptr::null_mut();
        let at = mode.arena;
        // SAFETY: the functions are called as unicorn.h describes, and `data` lives as long as the emulator.
        unsafe {
            let done = |code: c_int| assert_eq!(code, 0, "Unicorn refuses to be set up");
            done((api.open)(ARCH_X86, kind, &mut engine));
            done((api.control)(engine, SET_CPU_MODEL, ICELAKE_SERVER));
            done((api.map)(engine, at + SLOT_PAGE_OFFSET, PAGE, PROT_READ | PROT_EXECUTE));
            done((api.write)(engine, at + SLOT_PAGE_OFFSET, [HLT; PAGE].as_ptr().cast(), PAGE));
            done((api.map_ptr)(engine, at + DATA_OFFSET, DATA_SIZE, PROT_READ | PROT_WRITE, data.as_mut_ptr().cast()));
            done((api.map)(engine, at + DATA_OFFSET + READ_ONLY_OFFSET, PAGE, PROT_READ));
            done((api.write)(engine, at + DATA_OFFSET + READ_ONLY_OFFSET, read_only().as_ptr().cast(), PAGE));
        }
        Some(Unicorn { api, engine, mode, data, end: 0 })
    }

    /// Puts an instruction in place.
    pub fn load(&mut self, code: &[u8]) {
        let mut slot = [HLT; 32];
        slot[..code.len()].copy_from_slice(code);
        let at = self.mode.arena + SLOT_PAGE_OFFSET + SLOT_OFFSET as u64;
        // SAFETY: 32 bytes of the slot's page.
        let code_is = unsafe { (self.api.write)(self.engine, at, slot.as_ptr().cast(), slot.len()) };
        assert_eq!(code_is, 0, "Unicorn takes no code");
        self.end = at + code.len() as u64;
    }

    /// Runs the instruction with the registers of `before` on `memory` and compares what is behind it with `engine` and `after`.
    pub fn compare(&mut self, encoded: &Encoded, before: &Image, memory: &[u8], engine: &Image, after: &[u8]) -> Outcome {
        self.data.copy_from_slice(memory);
        let mut mine = *before;
        match self.run(&mut mine) {
            INVALID_INSTRUCTION => return Outcome::Lacks,
            // Behind a branch stands a HLT, which has run, or nothing that can be fetched.
            0 if mine.rip != self.end => mine.rip -= 1,
            0 | FETCH_UNMAPPED | FETCH_PROTECTED => {}
            _ => mine.fault = Some(Fault { vector: 0, error: 0, address: 0 }),
        }
        let mut engine = *engine;
        forget(encoded, before, &mut mine);
        forget(encoded, before, &mut engine);
        if mine == engine && *self.data == *after {
            Outcome::Agrees
        } else {
            Outcome::Differs
        }
    }

    fn run(&mut self, image: &mut Image) -> c_int {
        let mut registers = self.registers(image);
        let places = registers.places();
        let count = places.len() as c_int;
        // SAFETY: as many numbers and places as `count` says, each place with room for the widest register.
        unsafe {
            assert_eq!((self.api.registers_write)(self.engine, registers.numbers.as_ptr(), places.as_ptr(), count), 0);
            let outcome = (self.api.start)(self.engine, self.mode.slot(), self.end, 0, 0);
            registers.values.fill([0; 16]);
            assert_eq!((self.api.registers_read)(self.engine, registers.numbers.as_ptr(), places.as_ptr(), count), 0);
            self.store(&registers, image);
            outcome
        }
    }

    fn registers(&self, image: &Image) -> Registers {
        let (area, mut registers) = (&image.area, Registers::default());
        let (gpr, rip): (&[c_int], _) = if self.mode.is_64() { (&GPR_64, RIP_64) } else { (&GPR_32, RIP_32) };
        for (number, value) in gpr.iter().zip(image.gpr) {
            registers.push(*number, &value.to_le_bytes());
        }
        registers.push(rip, &self.mode.slot().to_le_bytes());
        registers.push(EFLAGS, &(image.rflags as u32).to_le_bytes());
        registers.push(FPCW, &area.fcw.to_le_bytes());
        registers.push(FPSW, &area.fsw.to_le_bytes());
        let tags = (0..8).filter(|n| area.ftw >> n & 1 == 0).fold(0u16, |tags, n| tags | 3 << (2 * n));
        registers.push(FPTAG, &tags.to_le_bytes());
        registers.push(MXCSR, &area.mxcsr.to_le_bytes());
        let top = area.fsw >> 11 & 7;
        for n in 0..8 {
            registers.push(FP0 + c_int::from((top + n) % 8), &area.st[usize::from(n)][..10]);
        }
        for n in 0..self.vectors() {
            registers.push(XMM0 + n as c_int, &area.xmm[n]);
        }
        registers
    }

    fn vectors(&self) -> usize {
        if self.mode.is_64() {
            16
        } else {
            8
        }
    }

    fn store(&self, registers: &Registers, image: &mut Image) {
        let mut values = registers.values.iter();
        let mut next = || Registers::take(&mut values);
        let count = if self.mode.is_64() { 16 } else { 8 };
        image.gpr[..count].iter_mut().for_each(|gpr| *gpr = next() as u64);
        image.rip = next() as u64;
        image.rflags = u64::from(next() as u32);
        let top = image.area.fsw >> 11 & 7;
        (image.area.fcw, image.area.fsw) = (next() as u16, next() as u16);
        let tags = next() as u16;
        image.area.ftw = (0..8).filter(|n| tags >> (2 * n) & 3 != 3).fold(0, |bits, n| bits | 1 << n);
        image.area.mxcsr = next() as u32;
        let mut physical = [[0; 16]; 8];
        for n in 0..8 {
            physical[usize::from((top + n) % 8)] = next().to_le_bytes();
        }
        let top = usize::from(image.area.fsw >> 11 & 7);
        (0..8).for_each(|n| image.area.st[n] = physical[(top + n) % 8]);
        (0..self.vectors()).for_each(|n| image.area.xmm[n] = next().to_le_bytes());
        image.area.normalize();
    }
}

/// Clears what Unicorn is no authority on.
fn forget(encoded: &Encoded, before: &Image, image: &mut Image) {
    let insn = &encoded.insn;
    image.rflags &= rflags::ARITHMETIC | rflags::DF | rflags::AC | rflags::ID;
    image.rflags &= !undefined(insn, before);
    image.area.mxcsr &= !EXCEPTIONS;
    let x87 = is_x87(insn);
    image.area.fsw &= if x87 && comparison(insn) { TOP | CONDITIONS } else { TOP };
    if !x87 {
        // QEMU's MMX registers are 64 bits wide; the exponents under them are not set.
        image.area.st.iter_mut().for_each(|st| st[8..].fill(0));
    }
}

/// Whether a state is one of those that QEMU's x87 is made for: no unmasked exception, no stack fault.
pub fn knows_state(engine: &Image) -> bool {
    engine.area.fcw & MASKS == MASKS && engine.area.fsw & (STACK_FAULT | SUMMARY) == 0
}

/// Whether Unicorn can be asked about an instruction.
pub fn knows(insn: &Instruction) -> bool {
    use Mnemonic::*;
    let selector = (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_segment_register());
    match insn.mnemonic() {
        // Some lengths make 2.1.4 crash.
        Pcmpestri | Pcmpestri64 | Pcmpestrm | Pcmpestrm64 => false,
        _ => !selector && (insn.code().encoding() != EncodingKind::VEX || family(insn.code()).starts_with("BMI")),
    }
}

impl Drop for Unicorn {
    fn drop(&mut self) {
        // SAFETY: opened by `new`, closed once.
        unsafe { (self.api.close)(self.engine) };
    }
}
