//! One CPU: the registers while they run, and everything that the core caches about the guest.

mod blocks;
pub mod breakpoint;
pub mod clock;
pub mod coherence;
pub mod descriptor;
pub mod dispatch;
pub mod mode;
pub mod signal;
pub mod stack;
pub mod switch;
pub mod watch;

use std::sync::Arc;

use crate::cpu::breakpoint::Breakpoints;
use crate::cpu::clock::Clock;
use crate::cpu::signal::Signal;
use crate::decode::block::Key;
use crate::decode::cache::CodeCache;
use crate::fault::{vector, Fault};
use crate::flags::Flags;
use crate::jit::native::Native;
use crate::jit::Translator;
use crate::memory::nested::NestedPageTable;
use crate::memory::waivers::Waivers;
use crate::model::{Model, Silicon};
use crate::paging::frames::Frames;
use crate::paging::tlb::{self, Tlb};
use crate::paging::walk::Context;
use crate::paging::{canonical, unused_bits, Privilege};
use crate::pmu::{Pmu, Watching};
use crate::state::{cr0, interruptibility, rflags, seg, Segment, State};
use crate::uop::{slot, Exec, RegOffset, Stop, Uop, RIP_STRIDE};
use crate::virt::apic::Apic;
use crate::virt::control::{self, Access, Control, Exit};
use crate::virt::halt::{self, Crowded};
use crate::word::Word;

/// Work that the dispatcher does before the next block; bits of `Cpu::pending`.
pub mod pending {
    /// An interrupt shadow covers the next instruction.
    pub const SHADOW: u32 = 1;
    /// EFLAGS.TF is set, or the monitor trap flag is on: run one instruction at a time.
    pub const STEP: u32 = 2;
    /// The hypervisor waits for an interrupt or NMI window.
    pub const WINDOW: u32 = 4;
    /// A debug trap (data breakpoint, single step) waits for the end of the instruction.
    pub const DEBUG: u32 = 8;
    /// The CPU is halted.
    pub const HALTED: u32 = 16;
    /// The hypervisor asked for exactly one instruction.
    pub const EMULATE: u32 = 32;
    /// The instruction budget of the hypervisor is nearly used up: run one instruction at a time.
    pub const BUDGET: u32 = 64;
    /// DR7 turns a breakpoint on: run one instruction at a time.
    pub const BREAKPOINTS: u32 = 128;
    /// Counters begin to count, or branches to be recorded: the dispatcher of `watch` takes over.
    pub const WATCHED: u32 = 256;
    /// The virtual APIC has an interrupt that the guest's priority lets through.
    pub const VIRTUAL: u32 = 512;
    /// The last instruction is complete, and its effect on the virtual APIC is for the hypervisor.
    pub const APIC_EXIT: u32 = 1024;
}

/// How wide code, addresses and RIP are by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum CodeSize {
    #[default]
    Bits16 = 0,
    Bits32 = 1,
    Bits64 = 2,
}

/// Bits of `Cpu::jump_context` below the generation.
const CONTEXT_BITS: u32 = 8;

/// A CPU with a guest on it. `repr(C)` keeps what every instruction touches in the first cache lines.
#[repr(C, align(64))]
pub struct Cpu {
    /// General registers, then the slots of [`slot`].
    pub regs: [u64; slot::COUNT],
    /// Arithmetic flags.
    pub flags: Flags,
    /// The running micro-op of a block.
    pub at: *const Uop,
    /// Entries of the TLB table that matches the privilege of the running code.
    pub active_table: *const tlb::Entries,
    /// What host code keeps.
    pub native: Native,
    /// What `active_table` is at CPL 0 with EFLAGS.AC clear and set.
    pub(crate) kernel_tables: [*const tlb::Entries; 2],
    /// What it is at CPL 3 without alignment checks.
    pub(crate) user_table: *const tlb::Entries,
    /// What `jump_context` is at CPL 0 and at CPL 3.
    pub(crate) contexts: [u64; 2],
    /// Segment bases as addresses use them: zero for ES, CS, SS and DS in 64-bit mode. Entry 6 is "no segment".
    pub(crate) bases: [u64; 8],
    /// RFLAGS without the arithmetic flags.
    pub rflags: u64,
    /// Work for the dispatcher, bits of [`pending`].
    pub pending: u32,
    pub(crate) cpl: u8,
    pub code_size: CodeSize,
    /// Bits of [`mode::media`]: why a vector or x87 instruction may not run.
    pub media: u8,
    /// Whose undefined flags and results it has.
    pub silicon: Silicon,
    /// Upper bits of an address that must repeat the one below them; see [`Cpu::canonical`].
    unused_address_bits: u8,
    /// What a jump-cache entry depends on besides RIP: generation of the translations, privilege, code size.
    pub jump_context: u64,
    /// Instructions that may run before the dispatcher looks at clocks.
    pub budget: i64,
    /// Runs of a block before it is translated; zero for never.
    pub(crate) hot: u32,

    /// The rest of the architectural state. `gpr`, `rip` and `rflags` in here are stale while the guest runs.
    pub state: State,
    pub control: Control,
    pub exit: Exit,
    pub fault: Fault,
    /// Base of the last code segment of 16 or 32 bits: `jump_context` stands for code at that base.
    code_base: u64,
    /// Registers that translation depends on; follows `state`.
    pub paging: Context,
    pub tlb: Tlb,
    pub frames: Frames,
    pub code: CodeCache,
    pub translator: Option<Box<Translator>>,
    pub npt: Arc<NestedPageTable>,
    /// Generation of `npt` that the TLB was last flushed for.
    pub nested_generation: u64,
    pub signal: Arc<Signal>,
    pub clock: Clock,
    pub model: Arc<Model>,
    pub pmu: Pmu,
    /// Completed device accesses of an emulated instruction, and how many of them it has used.
    pub accesses: Vec<Access>,
    pub access_next: usize,
    /// Rights that the first instruction has beyond those of `npt`.
    pub waivers: Waivers,
    /// Permission bitmaps of the hypervisor, of the block that the CPU runs on; null outside a run.
    pub(crate) bitmaps: *const control::Block,
    pub apic: Apic,
    /// What a HLT that waits awake asks.
    pub(crate) crowded: Crowded,
    /// The event whose delivery is under way, in the format of exit interruption information; zero when there is none.
    pub vectoring: u32,
    pub vectoring_error: u32,
    /// The instruction has seen to its single-step trap by itself: INT n, INT3, INTO and INT1 have none, and SYSCALL and SYSRET go by
    /// the TF that they load.
    pub step_settled: bool,
    /// The breakpoints of the debug registers.
    pub breakpoints: Breakpoints,
    /// Instructions retired before the current budget was handed out; see [`Cpu::instructions`].
    pub retired: u64,
    pub budget_start: i64,
    pub walks: u64,
    pub blocks_run: u64,
    /// Opcodes that the engine lacks, each logged once.
    pub unknown_opcodes: std::collections::HashSet<u16>,
}

// SAFETY: `active_table`, `kernel_tables` and `user_table` point into `tlb` and `at` into `code`, which move between threads together with
// the CPU, and `bitmaps` is null outside a run.
unsafe impl Send for Cpu {}

impl Cpu {
    /// A CPU of `model` after power-on.
    pub fn new(model: Arc<Model>, clock: Clock) -> Box<Self> {
        let mut cpu = Box::new(Cpu {
            regs: [0; slot::COUNT],
            flags: Flags::default(),
            at: std::ptr::null(),
            active_table: std::ptr::null(),
            kernel_tables: [std::ptr::null(); 2],
            user_table: std::ptr::null(),
            contexts: [0; 2],
            bases: [0; 8],
            rflags: rflags::FIXED,
            pending: 0,
            cpl: 0,
            code_size: CodeSize::Bits16,
            media: 0,
            silicon: model.silicon(),
            unused_address_bits: 16,
            jump_context: 0,
            budget: 0,
            hot: 0,
            state: State::default(),
            control: Control::default(),
            exit: Exit::default(),
            fault: Fault::default(),
            code_base: 0,
            paging: Context::default(),
            tlb: Tlb::default(),
            frames: Frames::default(),
            code: CodeCache::default(),
            native: Native::default(),
            translator: None,
            npt: Arc::default(),
            nested_generation: 0,
            signal: Arc::default(),
            clock,
            pmu: Pmu::new(&model),
            model,
            accesses: Vec::new(),
            access_next: 0,
            waivers: Waivers::default(),
            bitmaps: std::ptr::null(),
            apic: Apic::default(),
            crowded: halt::never_crowded,
            vectoring: 0,
            vectoring_error: 0,
            step_settled: false,
            breakpoints: Breakpoints::default(),
            retired: 0,
            budget_start: 0,
            walks: 0,
            blocks_run: 0,
            unknown_opcodes: Default::default(),
        });
        cpu.regs[slot::STRIDE as usize] = (RIP_STRIDE / 2) as u64;
        cpu.refresh();
        cpu
    }

    // ---- registers ------------------------------------------------------------------------------------------------------------------

    /// Reads a general register of any width.
    #[inline(always)]
    pub fn reg<W: Word>(&self, at: RegOffset) -> W {
        debug_assert!(at as usize + W::BYTES as usize <= size_of_val(&self.regs));
        // SAFETY: offsets come from the decoder, which makes them from register numbers below `slot::COUNT`.
        unsafe { self.regs.as_ptr().cast::<u8>().add(at as usize).cast::<W>().read_unaligned() }
    }

    /// Writes a general register; 32-bit writes clear the upper half (SDM vol. 1, 3.4.1.1).
    #[inline(always)]
    pub fn set_reg<W: Word>(&mut self, at: RegOffset, value: W) {
        debug_assert!(at < 16 * 8);
        // SAFETY: as in `reg`.
        unsafe {
            let register = self.regs.as_mut_ptr().cast::<u8>().add(at as usize);
            if W::BITS == 32 {
                register.cast::<u64>().write_unaligned(value.zero_extend());
            } else {
                register.cast::<W>().write_unaligned(value);
            }
        }
    }

    /// General register by number (see [`crate::state::gpr`]).
    #[inline(always)]
    pub fn gpr(&self, number: usize) -> u64 {
        self.regs[number]
    }

    /// Writes all 64 bits of a general register.
    #[inline(always)]
    pub fn set_gpr(&mut self, number: usize, value: u64) {
        self.regs[number] = value;
    }

    /// RIP of the running block; at a block boundary, the RIP of the guest.
    #[inline(always)]
    pub fn rip(&self) -> u64 {
        self.regs[slot::RIP as usize]
    }

    /// Sets RIP, truncated to the width of the code segment.
    #[inline(always)]
    pub fn set_rip(&mut self, rip: u64) {
        self.regs[slot::RIP as usize] = match self.code_size {
            CodeSize::Bits64 => rip,
            CodeSize::Bits32 => rip & 0xffff_ffff,
            CodeSize::Bits16 => rip & 0xffff,
        };
    }

    /// [`Cpu::set_rip`] for 64-bit code.
    #[inline(always)]
    pub fn set_rip_64(&mut self, rip: u64) {
        debug_assert!(self.long_mode());
        self.regs[slot::RIP as usize] = rip;
    }

    /// RIP `distance` bytes behind the first byte of the running block, truncated as the code segment asks.
    #[inline(always)]
    pub fn rip_at(&self, distance: u64) -> u64 {
        let rip = self.rip().wrapping_add(distance);
        match self.code_size {
            CodeSize::Bits64 => rip,
            CodeSize::Bits32 => rip & 0xffff_ffff,
            CodeSize::Bits16 => rip & 0xffff,
        }
    }

    /// RFLAGS as software sees them.
    pub fn rflags(&self) -> u64 {
        self.rflags | self.flags.bits()
    }

    /// Replaces RFLAGS; the caller has masked what may not change.
    pub fn set_rflags(&mut self, image: u64) {
        self.flags = Flags::from_bits(image);
        let old = self.rflags;
        self.rflags = image & (rflags::WRITABLE & !rflags::ARITHMETIC) | rflags::FIXED;
        if (old ^ self.rflags) & (rflags::TF | rflags::AC | rflags::VM) != 0 {
            self.refresh();
        }
    }

    /// Base of a segment as addresses use it.
    #[inline(always)]
    pub fn segment_base(&self, number: usize) -> u64 {
        self.bases[number & 7]
    }

    /// Replaces a data segment register. After CS or SS the caller calls [`Cpu::refresh`] too.
    pub fn set_segment(&mut self, number: usize, segment: Segment) {
        self.state.segments[number] = segment;
        let used = !self.long_mode() || number == seg::FS || number == seg::GS;
        self.bases[number] = if used { segment.base } else { 0 };
    }

    /// Replaces the base of FS or GS.
    #[inline(always)]
    pub fn set_segment_base(&mut self, number: usize, base: u64) {
        debug_assert!(number == seg::FS || number == seg::GS);
        self.state.segments[number].base = base;
        self.bases[number] = base;
    }

    #[inline(always)]
    pub fn cpl(&self) -> u8 {
        self.cpl
    }

    /// Whether the CPU is in IA-32e mode with a 64-bit code segment.
    #[inline(always)]
    pub fn long_mode(&self) -> bool {
        self.code_size == CodeSize::Bits64
    }

    /// Whether CR0.PE is set and the CPU is not in virtual-8086 mode.
    pub fn protected(&self) -> bool {
        self.state.cr0 & cr0::PE != 0 && self.rflags & rflags::VM == 0
    }

    /// Whether the CPU is in virtual-8086 mode.
    pub fn virtual_8086(&self) -> bool {
        self.rflags & rflags::VM != 0
    }

    /// Replaces RFLAGS without looking at what follows from it; the caller calls [`Cpu::refresh`] or a narrower one.
    #[inline(always)]
    pub fn load_rflags(&mut self, image: u64) {
        self.flags = Flags::from_bits(image);
        self.rflags = image & (rflags::WRITABLE & !rflags::ARITHMETIC) | rflags::FIXED;
    }

    /// Privilege of accesses that the running code makes.
    pub fn privilege(&self) -> Privilege {
        match (self.cpl, self.rflags & rflags::AC) {
            (3, _) => Privilege::User,
            (_, 0) => Privilege::Supervisor,
            _ => Privilege::SupervisorAc,
        }
    }

    /// Instructions retired since power-on, exact at a block boundary.
    pub fn instructions(&self) -> u64 {
        self.retired.wrapping_add((self.budget_start - self.budget) as u64)
    }

    /// Whether `la` is canonical for the paging mode.
    #[inline(always)]
    pub fn canonical(&self, la: u64) -> bool {
        canonical(la, self.unused_address_bits)
    }

    /// Whether a register may hold `base`: it must be canonical for the widest addresses that the CPU has, whatever the paging mode.
    pub fn canonical_base(&self, base: u64) -> bool {
        canonical(base, self.model.unused_address_bits())
    }

    // ---- exceptions -----------------------------------------------------------------------------------------------------------------

    /// Raises an exception without error code: `return Err(cpu.raise(vector::UD))`.
    #[cold]
    pub fn raise(&mut self, vector: u8) -> Stop {
        self.fault = Fault { vector, error: None, payload: 0 };
        Stop::Fault
    }

    /// Raises an exception with an error code.
    #[cold]
    pub fn raise_error(&mut self, vector: u8, error: u32) -> Stop {
        self.fault = Fault { vector, error: Some(error), payload: 0 };
        Stop::Fault
    }

    /// #GP with a zero error code.
    #[cold]
    pub fn general_protection(&mut self) -> Stop {
        self.raise_error(vector::GP, 0)
    }

    /// #UD.
    #[cold]
    pub fn undefined(&mut self) -> Stop {
        self.raise(vector::UD)
    }

    /// #PF at `la`.
    #[cold]
    pub fn raise_page_fault(&mut self, la: u64, code: u32) -> Stop {
        self.fault = Fault { vector: vector::PF, error: Some(code), payload: la };
        Stop::Fault
    }

    /// #GP(0) unless the code runs at CPL 0.
    #[inline]
    pub fn require_cpl0(&mut self) -> Exec {
        if self.cpl != 0 {
            return Err(self.general_protection());
        }
        Ok(())
    }

    /// Blocks interrupts (STI) or interrupts and debug traps (MOV SS) for one instruction.
    pub fn shadow(&mut self, kind: u32) {
        debug_assert!(kind == interruptibility::STI || kind == interruptibility::MOV_SS);
        self.state.interruptibility = self.state.interruptibility & !(interruptibility::STI | interruptibility::MOV_SS) | kind;
        self.pending |= pending::SHADOW;
    }

    // ---- derived state --------------------------------------------------------------------------------------------------------------

    /// Recomputes everything that depends on control registers, segments, EFER, XCR0 and RFLAGS. Whoever changes one of them calls this.
    pub fn refresh(&mut self) {
        self.cpl = self.current_privilege();
        self.code_size = self.current_code_size();
        self.media = self.current_media();
        self.unused_address_bits = unused_bits(self.state.cr4);
        let flat = self.code_size == CodeSize::Bits64;
        if !flat && self.state.segments[seg::CS].base != self.code_base {
            self.code_base = self.state.segments[seg::CS].base;
            self.tlb.forget_code();
        }
        for number in 0..6 {
            let keep = !flat || number == seg::FS || number == seg::GS;
            self.bases[number] = if keep { self.state.segments[number].base } else { 0 };
        }
        self.paging = Context::new(&self.state, self.model.physical_bits());
        self.refresh_table();
        self.refresh_pending();
    }

    /// [`Cpu::refresh`] for a transfer between 64-bit code of any privilege, where only the privilege level and RFLAGS change.
    pub fn refresh_privilege(&mut self) {
        self.cpl = self.state.segments[seg::SS].dpl();
        self.refresh_table();
        self.refresh_pending();
    }

    /// How host code of the running code watches branches.
    #[inline(always)]
    fn watching(&self) -> Watching {
        self.pmu.watching.at_level(self.cpl)
    }

    /// Key of the block at `host` in the running code.
    pub fn code_key(&self, host: u64) -> Key {
        Key { host, size: self.code_size, watching: self.watching() }
    }

    /// Points `active_table` to the table of the current privilege and address space. Whoever switches or flushes the TLB calls this.
    pub fn refresh_table(&mut self) {
        self.contexts = [0, 3].map(|cpl| self.context_at(cpl));
        self.jump_context = if matches!(self.cpl, 0 | 3) { self.contexts[usize::from(self.cpl == 3)] } else { self.context_at(self.cpl) };
        self.kernel_tables = [Privilege::Supervisor, Privilege::SupervisorAc].map(|privilege| self.tlb.table(privilege));
        self.user_table = self.tlb.table(Privilege::User);
        self.active_table = match self.privilege() {
            Privilege::User if self.alignment_checked() => tlb::never(),
            Privilege::User => self.user_table,
            Privilege::Supervisor => self.kernel_tables[0],
            Privilege::SupervisorAc => self.kernel_tables[1],
        };
    }

    /// What `jump_context` is at privilege level `cpl`.
    #[inline(always)]
    fn context_at(&self, cpl: u8) -> u64 {
        let user = cpl == 3;
        let low = self.pmu.watching.at_level(cpl).in_context() | u64::from(user) << 4 | self.code_size as u64;
        self.tlb.generation(user) << CONTEXT_BITS | low
    }
}
