//! What a comparison sees of a CPU: registers in one layout for both sides, and how an instruction ended.

use softkvm_engine::state::Fpu;

/// The XSAVE area in standard format with x87, SSE and AVX (SDM vol. 1, 13.4).
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Area {
    pub fcw: u16,
    pub fsw: u16,
    pub ftw: u16,
    pub fop: u16,
    pub fip: u64,
    pub fdp: u64,
    pub mxcsr: u32,
    pub mxcsr_mask: u32,
    /// ST(0)..ST(7) by distance from the top.
    pub st: [[u8; 16]; 8],
    pub xmm: [[u8; 16]; 16],
    pub unused: [u8; 96],
    pub header: [u64; 8],
    pub ymm_high: [[u8; 16]; 16],
}

const _: () = assert!(size_of::<Area>() == 832);

/// x87, SSE and AVX are in the area.
const COMPONENTS: u64 = 7;

impl Default for Area {
    fn default() -> Self {
        Area {
            fcw: 0x37f,
            fsw: 0,
            ftw: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            mxcsr: 0x1f80,
            mxcsr_mask: 0,
            st: [[0; 16]; 8],
            xmm: [[0; 16]; 16],
            unused: [0; 96],
            header: [COMPONENTS, 0, 0, 0, 0, 0, 0, 0],
            ymm_high: [[0; 16]; 16],
        }
    }
}

impl Area {
    /// Clears what no comparison looks at: last-instruction pointers, which parts leave at different values, and the header.
    pub fn normalize(&mut self) {
        (self.fop, self.fip, self.fdp, self.mxcsr_mask) = (0, 0, 0, 0);
        self.unused = [0; 96];
        self.header = [COMPONENTS, 0, 0, 0, 0, 0, 0, 0];
        for st in &mut self.st {
            st[10..].fill(0);
        }
    }

    fn top(&self) -> usize {
        usize::from(self.fsw >> 11 & 7)
    }

    /// Loads the engine's registers.
    pub fn to_fpu(self, fpu: &mut Fpu) {
        (fpu.fcw, fpu.fsw, fpu.ftw, fpu.mxcsr) = (self.fcw, self.fsw, self.ftw as u8, self.mxcsr);
        (fpu.fop, fpu.fip, fpu.fdp) = (0, 0, 0);
        for n in 0..8 {
            fpu.st[(self.top() + n) % 8] = self.st[n];
        }
        for n in 0..16 {
            fpu.vector[n][..16].copy_from_slice(&self.xmm[n]);
            fpu.vector[n][16..32].copy_from_slice(&self.ymm_high[n]);
        }
    }

    /// The engine's registers.
    pub fn from_fpu(fpu: &Fpu) -> Self {
        let mut area = Area { fcw: fpu.fcw, fsw: fpu.fsw, ftw: fpu.ftw.into(), mxcsr: fpu.mxcsr, ..Area::default() };
        for n in 0..8 {
            area.st[n] = fpu.st[(area.top() + n) % 8];
        }
        for n in 0..16 {
            area.xmm[n].copy_from_slice(&fpu.vector[n][..16]);
            area.ymm_high[n].copy_from_slice(&fpu.vector[n][16..32]);
        }
        area.normalize();
        area
    }
}

/// The exception that an instruction raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    pub vector: u8,
    pub error: u32,
    /// Page faults: CR2.
    pub address: u64,
}

/// Registers around an instruction.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Image {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub area: Area,
    pub fault: Option<Fault>,
}

impl Default for Image {
    fn default() -> Self {
        Image { gpr: [0; 16], rip: 0, rflags: 0x202, area: Area::default(), fault: None }
    }
}

impl Image {
    /// What differs between two images, one line for each register: name, left, right.
    pub fn differences(&self, other: &Image) -> Vec<String> {
        const NAMES: [&str; 16] =
            ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
        let mut lines = Vec::new();
        let mut number = |name: &str, a: u64, b: u64| {
            if a != b {
                lines.push(format!("{name} {a:#x} {b:#x}"));
            }
        };
        for (n, name) in NAMES.iter().enumerate() {
            number(name, self.gpr[n], other.gpr[n]);
        }
        number("rip", self.rip, other.rip);
        number("rflags", self.rflags, other.rflags);
        let (a, b) = (&self.area, &other.area);
        number("mxcsr", a.mxcsr.into(), b.mxcsr.into());
        number("fcw", a.fcw.into(), b.fcw.into());
        number("fsw", a.fsw.into(), b.fsw.into());
        number("ftw", a.ftw.into(), b.ftw.into());
        let groups = [("st", &a.st[..], &b.st[..]), ("xmm", &a.xmm, &b.xmm), ("ymm_high", &a.ymm_high, &b.ymm_high)];
        for (name, a, b) in groups {
            for (n, (a, b)) in a.iter().zip(b).enumerate().filter(|(_, (a, b))| a != b) {
                lines.push(format!("{name}{n} {:032x} {:032x}", u128::from_le_bytes(*a), u128::from_le_bytes(*b)));
            }
        }
        if self.fault != other.fault {
            lines.push(format!("fault {:x?} {:x?}", self.fault, other.fault));
        }
        lines
    }
}
