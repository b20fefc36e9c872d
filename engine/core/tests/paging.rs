//! The TLB, and what translated code remembers of it, against fresh walks: whatever software changes and then invalidates as the manual asks
//! (SDM vol. 3, 4.10.4), accesses go where the page tables lead.

mod common;

use common::{Machine, Random, CODE, RAM_SIZE};
use softkvm_engine::fault::vector;
use softkvm_engine::model::Model;
use softkvm_engine::paging::walk::{probe, Context};
use softkvm_engine::paging::AccessKind;
use softkvm_engine::state::{cr4, gpr, rflags, rights, seg, Segment};
use softkvm_engine::virt::control::intercept;

const PAGE: u64 = 4096;
/// Root tables of the address spaces, each followed by its own tables.
const SPACES: [u64; 3] = [0x28_0000, 0x29_0000, 0x2a_0000];
/// The table behind the last entry of every root.
const SHARED: u64 = 0x2b_0000;
/// Frames that pages may be at, each full of its own number.
const FRAMES: u64 = 0x30_0000;
const FRAME_COUNT: u64 = 32;
/// Pages of 4 KB in each space and in the shared part, and one of 2 MB behind them.
const PAGES: u64 = 6;
/// Pages of an address space, and those of all: global if their entries say so.
const OWN: u64 = 1 << 39;
const COMMON: u64 = 0xffff_ff80_0000_0000;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const DIRTY: u64 = 0x40;
const LARGE: u64 = 0x80;
const GLOBAL: u64 = 0x100;
const NO_EXECUTE: u64 = 1 << 63;
const TABLE: u64 = PRESENT | WRITABLE | USER | 0x20;

const INVLPG: [u8; 3] = [0x0f, 0x01, 0x38]; // invlpg [rax]
const INVPCID: [u8; 5] = [0x66, 0x0f, 0x38, 0x82, 0x0b]; // invpcid rcx, [rbx]
const MOV_CR3: [u8; 3] = [0x0f, 0x22, 0xd8]; // mov cr3, rax
const DESCRIPTOR: u64 = 0x7000;
/// A page of accesses, for the kernel, and where users find the same page.
const ACCESSES: u64 = 0x9000;
const USERS_ACCESSES: u64 = 0xa000;
const LOAD: [u8; 4] = [0x48, 0x8b, 0x03, 0xf4]; // mov rax, [rbx]; hlt
const EXCHANGE: [u8; 5] = [0x48, 0x0f, 0xc1, 0x03, 0xf4]; // xadd [rbx], rax; hlt
const EXCHANGE_AT: u64 = 0x40;
const EXIT_EXCEPTION: u32 = 0;
const EXIT_HLT: u32 = 12;

struct Spaces {
    machine: Machine,
    random: Random,
    current: u64,
}

/// A page: of the current address space or another, or of all.
#[derive(Clone, Copy)]
struct Page {
    la: u64,
    /// Where its entry is.
    entry: u64,
    shared: bool,
    large: bool,
}

impl Spaces {
    fn new(seed: u64) -> Self {
        let mut machine = Machine::with_model(Model::default());
        machine.map(USERS_ACCESSES, ACCESSES);
        machine.poke(ACCESSES, &LOAD);
        machine.poke(ACCESSES + EXCHANGE_AT, &EXCHANGE);
        machine.cpu.control.intercepts |= 1 << intercept::HLT;
        machine.cpu.control.exception_bitmap = 1 << vector::PF | 1 << vector::GP;
        machine.cpu.set_translator(Some(1));
        [CODE, DESCRIPTOR, ACCESSES].into_iter().for_each(|page| machine.map_supervisor_with_key(page, 0));
        let root = machine.cpu.state.cr3;
        let identity = machine.peek(root, 8);
        for frame in 0..FRAME_COUNT {
            machine.slice(FRAMES + frame * PAGE, PAGE as usize).fill(frame as u8);
        }
        let link = |machine: &mut Machine, at: u64, table: u64| machine.poke(at, &(table | TABLE).to_le_bytes());
        for space in SPACES {
            machine.poke(space, &identity);
            link(&mut machine, space + 8, space + PAGE);
            link(&mut machine, space + 511 * 8, SHARED);
            (1..3).for_each(|level| link(&mut machine, space + level * PAGE, space + (level + 1) * PAGE));
        }
        (0..2).for_each(|level| link(&mut machine, SHARED + level * PAGE, SHARED + (level + 1) * PAGE));
        machine.cpu.state.cr3 = SPACES[0];
        machine.cpu.state.cr4 |= cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP;
        machine.cpu.refresh();
        machine.cpu.tlb.flush();
        machine.cpu.refresh_table();
        Spaces { machine, random: Random::new(seed), current: 0 }
    }

    fn page(&mut self, space: u64) -> Page {
        let (number, shared) = (self.random.below(PAGES + 1), self.random.below(3) == 0);
        let large = number == PAGES;
        let (la, lowest) = if shared { (COMMON, SHARED + 2 * PAGE) } else { (OWN, SPACES[space as usize] + 3 * PAGE) };
        if large {
            // The second entry of the table above the lowest.
            return Page { la: la + (2 << 20) + self.random.below(512) * PAGE, entry: lowest - PAGE + 8, shared, large };
        }
        Page { la: la + number * PAGE, entry: lowest + number * 8, shared, large }
    }

    /// An entry for `page`. Global pages are the same in all address spaces.
    fn entry(&mut self, page: Page) -> u64 {
        let frame = if page.large { 0 } else { FRAMES + self.random.below(FRAME_COUNT) * PAGE };
        let rights = self.random.next() & (WRITABLE | USER | DIRTY | NO_EXECUTE);
        let present = if self.random.below(4) > 0 { PRESENT } else { 0 };
        let global = if page.shared { self.random.next() & GLOBAL } else { 0 };
        frame | rights | present | global | if page.large { LARGE } else { 0 }
    }

    /// Executes `code` as the kernel.
    fn execute(&mut self, code: &[u8]) {
        self.machine.run(code, 1).expect("the kernel may do that");
    }

    fn invalidate(&mut self, space: u64, page: Page) {
        let here = page.shared || space == self.current;
        let kind = self.random.below(4);
        if here && kind == 0 {
            self.machine.cpu.set_gpr(gpr::RAX, page.la);
            return self.execute(&INVLPG);
        }
        // Only all of INVPCID's kinds together drop global pages: the third does.
        let kind = if page.shared { 2 } else { kind };
        self.machine.poke(DESCRIPTOR, &[space.to_le_bytes(), page.la.to_le_bytes()].concat());
        self.machine.cpu.set_gpr(gpr::RCX, kind);
        self.machine.cpu.set_gpr(gpr::RBX, DESCRIPTOR);
        self.execute(&INVPCID);
    }

    fn change(&mut self) {
        let space = self.random.below(SPACES.len() as u64);
        let page = self.page(space);
        let value = self.entry(page);
        self.machine.poke(page.entry, &value.to_le_bytes());
        self.invalidate(space, page);
    }

    fn switch(&mut self) {
        self.current = self.random.below(SPACES.len() as u64);
        let keep = self.random.next() & 1 << 63;
        self.machine.cpu.set_gpr(gpr::RAX, SPACES[self.current as usize] | self.current | keep);
        self.execute(&MOV_CR3);
    }

    /// Accesses a page with some privilege, and holds the outcome against a walk.
    fn access(&mut self) {
        let page = self.page(self.current);
        let la = page.la + self.random.below(PAGE / 8) * 8;
        self.set_privilege();
        let cpu = &mut self.machine.cpu;
        let kind = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch][self.random.below(3) as usize];
        let context = Context::new(&cpu.state, 46);
        let expected = probe(&context, &cpu.npt.tree(), la, cpu.privilege(), kind).map(|mapping| mapping.gpa);
        let host = cpu.npt.lookup(0).expect("RAM").host;
        let found = match kind {
            AccessKind::Read => cpu.read::<u64>(seg::DS, la).map(drop),
            // What is written is what was there.
            AccessKind::Write => cpu.probe_write(seg::DS, la, 8),
            AccessKind::Fetch => cpu.fetch_address(la).map(|at| assert_eq!(at as u64 - host, expected.unwrap())),
        };
        assert_eq!(found.is_ok(), expected.is_ok(), "{kind:?} at {la:#x}");
        if let (AccessKind::Read | AccessKind::Write, Ok(gpa)) = (kind, expected) {
            assert!(gpa < RAM_SIZE as u64);
            let cached = cpu.cached(la, 8, kind).map(|at| at as u64 - host);
            assert!(cached.is_none_or(|at| at == gpa), "{kind:?} at {la:#x} went to {cached:x?} instead of {gpa:#x}");
            assert!(cached.is_some(), "a page of RAM is remembered");
        }
        self.reset_privilege();
    }

    /// [`Spaces::access`] by translated code, always at the same two places.
    fn access_translated(&mut self) {
        let page = self.page(self.current);
        let la = page.la + self.random.below(PAGE / 8) * 8;
        let write = self.random.below(2) == 0;
        self.set_privilege();
        let cpu = &mut self.machine.cpu;
        let kind = if write { AccessKind::Write } else { AccessKind::Read };
        let context = Context::new(&cpu.state, 46);
        let expected = probe(&context, &cpu.npt.tree(), la, cpu.privilege(), kind).map(|mapping| mapping.gpa);
        let user = cpu.cpl() == 3;
        (cpu.budget, cpu.regs[gpr::RAX], cpu.regs[gpr::RBX]) = (1 << 40, 0, la);
        self.machine.set_rip(if user { USERS_ACCESSES } else { ACCESSES } + if write { EXCHANGE_AT } else { 0 });
        let memory = expected.map(|gpa| u64::from_le_bytes(self.machine.bytes(gpa)));
        self.machine.cpu.run();
        let (exit, found) = (&self.machine.cpu.exit, self.machine.cpu.gpr(gpr::RAX));
        let exception = exit.interruption as u8;
        match memory {
            // A user's HLT is an exception too.
            Ok(memory) => {
                assert!(
                    exit.reason == if user { EXIT_EXCEPTION } else { EXIT_HLT } && (!user || exception == vector::GP),
                    "{kind:?} at {la:#x}"
                );
                assert_eq!(found, memory, "{kind:?} at {la:#x}");
            }
            Err(_) => assert_eq!((exit.reason, exception), (EXIT_EXCEPTION, vector::PF), "{kind:?} at {la:#x}"),
        }
        self.reset_privilege();
    }

    fn reset_privilege(&mut self) {
        self.machine.cpu.state.segments[seg::SS] = Segment::new(0x10, DATA_RIGHTS, u32::MAX, 0);
        self.machine.cpu.set_rflags(rflags::FIXED);
        self.machine.cpu.refresh();
    }

    fn set_privilege(&mut self) {
        let (level, ac) = [(0, 0), (0, rflags::AC), (3, 0)][self.random.below(3) as usize];
        self.machine.cpu.state.segments[seg::SS] = Segment::new(0x10, DATA_RIGHTS | level << rights::DPL_SHIFT, u32::MAX, 0);
        self.machine.cpu.set_rflags(rflags::FIXED | ac);
        self.machine.cpu.refresh();
    }
}

const DATA_RIGHTS: u32 = rights::PRESENT | rights::S | rights::RW | rights::ACCESSED | rights::DB | rights::GRANULARITY;

#[test]
fn accesses_go_where_the_tables_lead() {
    for seed in 0..20 {
        let mut spaces = Spaces::new(seed);
        for _ in 0..2000 {
            match spaces.random.below(10) {
                0 | 1 => spaces.change(),
                2 => spaces.switch(),
                3..6 => spaces.access_translated(),
                _ => spaces.access(),
            }
        }
    }
}
