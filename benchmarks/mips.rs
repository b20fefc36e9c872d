//! Millions of guest instructions per second on small loops, interpreted unwatched and with counters, branch records or the branch log on,
//! and as host code:
//! `cargo run --release -p softkvm-engine --example mips`.

use std::alloc::{alloc_zeroed, Layout};
use std::sync::Arc;
use std::time::Instant;

use softkvm_engine::jit::Tier;
use softkvm_engine::memory::nested::NestedPageTable;
use softkvm_engine::memory::region::Region;
use softkvm_engine::model::Model;
use softkvm_engine::pmu::log::Filter;
use softkvm_engine::pmu::registers::index;
use softkvm_engine::state::{cr0, cr4, efer, rights, seg, Segment, State};
use softkvm_engine::virt::control::Block;
use softkvm_engine::virt::entry::Core;

const RAM: usize = 4 << 20;
const TABLES: usize = 0x10_0000;
const CODE: usize = 0x1000;
/// A rate is the best of so many runs up to the core's next periodic interrupt, as other work on the machine only takes away.
const RUNS: usize = 60;

/// What the core's PMU does meanwhile.
#[derive(Clone, Copy, PartialEq)]
enum Watch {
    Nothing,
    Instructions,
    Branches,
    Lbr,
    Log,
}

impl Watch {
    const ALL: [Watch; 5] = [Watch::Nothing, Watch::Instructions, Watch::Branches, Watch::Lbr, Watch::Log];

    fn start(self, core: &mut Core, block: &mut Block) {
        const ALL_RINGS: u64 = 3 << 16 | 1 << 22;
        match self {
            Watch::Nothing => {}
            Watch::Instructions => core.pmu_write(index::FIXED_CTR_CTRL, 3).unwrap(),
            Watch::Branches => core.pmu_write(index::EVTSEL, ALL_RINGS | 0xc4).unwrap(),
            Watch::Lbr => block.state.debugctl = 1,
            Watch::Log => core.branch_log_start(1 << 16, Filter { rings: 3, low: 0, high: u64::MAX }),
        }
        core.pmu_write(index::GLOBAL_CTRL, 0xf | 7 << 32).unwrap();
    }
}

fn state() -> State {
    let mut state = State::default();
    let flat = rights::PRESENT | rights::S | rights::RW | rights::ACCESSED | rights::GRANULARITY;
    for number in 0..6 {
        let kind = if number == seg::CS { rights::CODE | rights::LONG } else { rights::DB };
        state.segments[number] = Segment::new(8, flat | kind, u32::MAX, 0);
    }
    state.rip = CODE as u64;
    state.rflags = 2;
    state.cr0 = cr0::PE | cr0::PG | cr0::ET;
    state.cr4 = cr4::PAE | cr4::OSFXSR;
    state.cr3 = TABLES as u64;
    state.efer = efer::LME | efer::LMA;
    state.gpr = [0; 16];
    state.gpr[4] = 0x8_0000;
    state.gpr[3] = 7;
    state.gpr[6] = 0x4_0000;
    state.gpr[7] = 0x5_0000;
    state
}

/// The rate of `code` in each mode, in one line.
fn run(name: &str, code: &[u8]) {
    let rates = Watch::ALL.map(|watch| format!("{:7.0}", rate(code, watch, Tier::Interpreter)));
    println!("{name:12} {} {:7.0}", rates.join(" "), rate(code, Watch::Nothing, Tier::Auto));
}

fn rate(code: &[u8], watch: Watch, tier: Tier) -> f64 {
    let ram = Arc::new(Region::new(RAM).unwrap());
    // SAFETY: the tables and the code lie inside the region.
    unsafe {
        for level in 0..2 {
            let table = ram.start().add(TABLES + level * 0x1000).cast::<u64>();
            table.write((TABLES + (level + 1) * 0x1000) as u64 | 7);
        }
        ram.start().add(TABLES + 0x2000).cast::<u64>().write(0x87);
        ram.start().add(TABLES + 0x2008).cast::<u64>().write(0x87 | 1 << 21);
        code.as_ptr().copy_to(ram.start().add(CODE), code.len());
    }
    let npt = Arc::new(NestedPageTable::default());
    npt.map(0, RAM as u64, &ram, 0, 7).unwrap();
    let mut core = Core::new(Arc::new(Model::new("cascadelake", &[]).unwrap().with_tier(tier)), 0);
    // SAFETY: zeroes are a valid block; it lives until the process ends.
    let block = unsafe { &mut *alloc_zeroed(Layout::new::<Block>()).cast::<Block>() };
    block.state = state();
    block.control.tsc_multiplier = 1 << 48;
    watch.start(&mut core, block);
    let run = |_| {
        let start = Instant::now();
        // SAFETY: the block is ours alone.
        let reason = unsafe { core.enter(block, &npt) };
        assert_eq!(reason, 1, "unexpected exit {reason} at {:#x}", block.state.rip);
        core.branch_log_read();
        block.exit.instructions as f64 / start.elapsed().as_secs_f64() / 1e6
    };
    (0..RUNS).map(run).fold(0.0, f64::max)
}

fn main() {
    println!("{:12} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7}", "MIPS", "plain", "insns", "brs", "LBR", "log", "host");
    // add rax, rbx; xor rcx, rax; sub rdx, rcx; lea rbx, [rbx+rcx]; and rax, rdx; dec r8; jnz
    run(
        "alu",
        &[
            0x48, 0x01, 0xd8, 0x48, 0x31, 0xc1, 0x48, 0x29, 0xca, 0x48, 0x8d, 0x1c, 0x0b, 0x48, 0x21, 0xd0, 0x49, 0xff, 0xc8, 0x75, 0xee,
            0xeb, 0xec,
        ],
    );
    // mov rax, [rsi]; add rax, 1; mov [rdi], rax; cmp rax, rcx; jne
    run("load-store", &[0x48, 0x8b, 0x06, 0x48, 0x83, 0xc0, 0x01, 0x48, 0x89, 0x07, 0x48, 0x39, 0xc8, 0x75, 0xf1, 0xeb, 0xef]);
    // push rax; pop rbx; call +2; jmp -9; ret
    run("call-ret", &[0x50, 0x5b, 0xe8, 0x02, 0x00, 0x00, 0x00, 0xeb, 0xf7, 0xc3]);
    // movups xmm0, [rsi+rax]; movups [rdi+rax], xmm0; add rax, 16; cmp rax, 4096; jne
    run(
        "sse-copy",
        &[
            0x0f, 0x10, 0x04, 0x06, 0x0f, 0x11, 0x04, 0x07, 0x48, 0x83, 0xc0, 0x10, 0x48, 0x3d, 0x00, 0x10, 0x00, 0x00, 0x75, 0xec, 0x31,
            0xc0, 0xeb, 0xe8,
        ],
    );
    // movsd xmm0, [rsi+rax]; mulsd xmm0, xmm1; addsd xmm2, xmm0; movsd [rdi+rax], xmm2; add rax, 8; cmp rax, 4096; jne
    run(
        "scalar",
        &[
            0xf2, 0x0f, 0x10, 0x04, 0x06, 0xf2, 0x0f, 0x59, 0xc1, 0xf2, 0x0f, 0x58, 0xd0, 0xf2, 0x0f, 0x11, 0x14, 0x07, 0x48, 0x83, 0xc0,
            0x08, 0x48, 0x3d, 0x00, 0x10, 0x00, 0x00, 0x75, 0xe2, 0x31, 0xc0, 0xeb, 0xde,
        ],
    );
    // movupd xmm0, [rsi+rax]; mulpd xmm0, xmm1; addpd xmm0, xmm2; movupd [rdi+rax], xmm0; add rax, 16; cmp rax, 4096; jne
    run(
        "packed",
        &[
            0x66, 0x0f, 0x10, 0x04, 0x06, 0x66, 0x0f, 0x59, 0xc1, 0x66, 0x0f, 0x58, 0xc2, 0x66, 0x0f, 0x11, 0x04, 0x07, 0x48, 0x83, 0xc0,
            0x10, 0x48, 0x3d, 0x00, 0x10, 0x00, 0x00, 0x75, 0xe2, 0x31, 0xc0, 0xeb, 0xde,
        ],
    );
    // fld qword [rsi+rax]; fmul qword [rdi+rax]; fadd qword [rsi+rax]; fstp qword [rdi+rax]; add rax, 8; cmp rax, 4096; jne
    run(
        "x87",
        &[
            0xdd, 0x04, 0x06, 0xdc, 0x0c, 0x07, 0xdc, 0x04, 0x06, 0xdd, 0x1c, 0x07, 0x48, 0x83, 0xc0, 0x08, 0x48, 0x3d, 0x00, 0x10, 0x00,
            0x00, 0x75, 0xe8, 0x31, 0xc0, 0xeb, 0xe4,
        ],
    );
    // mov rax, rcx; xor edx, edx; div rbx; add rsi, rdx; shl eax, cl; mov [rdi], eax; dec rcx; jnz
    run(
        "div-shift",
        &[
            0x48, 0x89, 0xc8, 0x31, 0xd2, 0x48, 0xf7, 0xf3, 0x48, 0x01, 0xd6, 0xd3, 0xe0, 0x89, 0x07, 0x48, 0xff, 0xc9, 0x75, 0xec, 0x48,
            0xff, 0xc9, 0xeb, 0xe7,
        ],
    );
}
