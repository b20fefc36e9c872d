//! Random programs over linear pages that lie anywhere in RAM, one of which may not be written, with nothing on either side of them: each is
//! run by the interpreter and as host code, and what the two leave behind is compared.

use softkvm_engine::virt::control::intercept;

use super::{Machine, Random, CODE};

pub const PAGE: u64 = 4096;
/// Where the linear pages begin, and the frames that are their memory.
const PLACE: u64 = 0x18_0000;
const FRAMES: u64 = 0x30_0000;
/// Bytes from one program to the next.
const DISTANCE: u64 = 128;

/// The pages: the number of each one's frame, and which of them is read-only.
pub struct Pages {
    pub frames: &'static [u64],
    pub read_only: usize,
}

/// What a run leaves behind: registers and CR2, RIP, RFLAGS, the exit, the number of instructions, memory.
type Outcome = (Vec<u64>, u64, u64, u32, u64, Vec<u8>);

impl Pages {
    fn size(&self) -> usize {
        self.frames.len() * PAGE as usize
    }

    /// The first byte of one of the pages.
    pub fn any(&self, random: &mut Random) -> u64 {
        PLACE + PAGE * random.below(self.frames.len() as u64)
    }

    /// Runs each program so many times from what `prepare` makes of registers and budget, and compares.
    pub fn compare(&self, programs: &[Vec<u8>], runs: u64, prepare: impl Fn(&mut Machine, &mut Random)) {
        let mut machines = [None, Some(1)].map(|tier| self.machine(tier, programs));
        let mut turns = 0;
        for (n, code) in programs.iter().enumerate() {
            for run in 0..runs {
                let (at, seed) = (CODE + n as u64 * DISTANCE, n as u64 * runs + run);
                let [wanted, found] = machines.each_mut().map(|machine| {
                    let mut random = Random::new(seed);
                    prepare(machine, &mut random);
                    machine.set_flags(random.next() & 0x8d5);
                    self.outcome(machine, at)
                });
                assert_eq!(wanted.0, found.0, "registers of program {n}, run {run}: {code:02x?}");
                assert_eq!(
                    (wanted.1, wanted.2, wanted.3, wanted.4),
                    (found.1, found.2, found.3, found.4),
                    "program {n}, run {run}: {code:02x?}"
                );
                turns += u64::from(wanted.4 > 2 * code.len() as u64);
                assert!(wanted.5 == found.5, "memory of program {n}, run {run}: {code:02x?}");
            }
        }
        assert!(turns * 4 > programs.len() as u64 * runs, "only {turns} runs were more than a turn or two");
    }

    fn machine(&self, tier: Option<u32>, programs: &[Vec<u8>]) -> Machine {
        let mut machine = Machine::new();
        machine.cpu.control.exception_bitmap = u32::MAX;
        machine.cpu.control.intercepts = 1 << intercept::HLT;
        machine.cpu.set_translator(tier);
        for (n, frame) in self.frames.iter().enumerate() {
            let (la, gpa) = (PLACE + n as u64 * PAGE, FRAMES + frame * PAGE);
            if n == self.read_only {
                machine.map_read_only(la, gpa);
            } else {
                machine.map(la, gpa);
            }
        }
        machine.unmap(PLACE - PAGE);
        machine.unmap(PLACE + self.size() as u64);
        for (at, code) in (CODE..).step_by(DISTANCE as usize).zip(programs) {
            assert!(code.len() <= DISTANCE as usize, "the next program is there");
            machine.poke(at, code);
        }
        machine
    }

    fn outcome(&self, machine: &mut Machine, at: u64) -> Outcome {
        machine.slice(FRAMES, self.size()).iter_mut().enumerate().for_each(|(n, byte)| *byte = (n * 7) as u8 ^ (n >> 5) as u8);
        machine.set_rip(at);
        let before = machine.cpu.instructions();
        machine.cpu.run();
        let registers = (0..16).map(|n| machine.cpu.gpr(n)).chain([machine.cpu.state.cr2]).collect();
        let memory = machine.peek(FRAMES, self.size());
        let cpu = &machine.cpu;
        (registers, cpu.rip(), cpu.rflags(), cpu.exit.reason, cpu.instructions() - before, memory)
    }
}
