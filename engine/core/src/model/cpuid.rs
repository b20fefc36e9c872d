//! CPUID as the silicon answers it (SDM vol. 2, CPUID; APM vol. 3, app. E).

use super::features::register::{EAX, EBX, ECX, EDX};
use super::{Feature, Model};

/// Bits of a linear address, with 4-level and with 5-level paging.
const LINEAR_BITS: [u32; 2] = [48, 57];
/// First extended leaf.
const EXTENDED: u32 = 0x8000_0000;
/// Bits of leaf 1 EDX that AMD repeats in leaf 80000001 EDX.
const AMD_REPEATED: u32 = 0x0183_f3ff;
/// Clock of the crystal behind the TSC. Linux multiplies it (in kHz) by the numerator of leaf 15 in 32 bits, so it must be slow.
const CRYSTAL_KHZ: u32 = 1000;
/// Bytes of an XSAVE area with the legacy region and the header alone.
const XSAVE_LEGACY: u32 = 576;

/// Leaf A: version 4, four general counters and three fixed ones of 48 bits, and all seven architectural events.
const PERFORMANCE_MONITORING: [u32; 4] = [0x0730_0404, 0, 0, 0x603];

/// The state components beyond x87 and SSE: bit in XCR0, the feature behind it, size and standard-format offset in bytes.
const COMPONENTS: &[(u32, Feature, u32, u32)] = &[
    (2, Feature::Avx, 256, 576),
    (5, Feature::Avx512f, 64, 1088),
    (6, Feature::Avx512f, 512, 1152),
    (7, Feature::Avx512f, 1024, 1664),
    (9, Feature::Pku, 8, 2688),
];

/// One answer of CPUID with its arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    pub leaf: u32,
    pub subleaf: u32,
    /// Whether the leaf's answer depends on the subleaf.
    pub indexed: bool,
    pub registers: [u32; 4],
}

impl Model {
    /// What CPUID answers. Beyond its range Intel silicon repeats its highest basic leaf, and AMD silicon answers zeros.
    pub fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let known = leaf <= self.part.highest_basic || (EXTENDED..=self.part.highest_extended).contains(&leaf);
        match (known, self.is_amd()) {
            (true, _) => self.answer(leaf, subleaf),
            (false, false) => self.answer(self.part.highest_basic, subleaf),
            (false, true) => [0; 4],
        }
    }

    /// Every leaf and subleaf that answers something.
    pub fn leaves(&self) -> Vec<Leaf> {
        let basic = 0..=self.part.highest_basic;
        let extended = EXTENDED..=self.part.highest_extended;
        basic.chain(extended).flat_map(|leaf| self.subleaves(leaf)).collect()
    }

    fn subleaves(&self, leaf: u32) -> Vec<Leaf> {
        let at = |subleaf, indexed| Leaf { leaf, subleaf, indexed, registers: self.answer(leaf, subleaf) };
        match leaf {
            // Up to and including the first cache of type "none".
            0x4 | 0x8000_001d => (0..=self.caches(leaf).len() as u32).map(|n| at(n, true)).collect(),
            // Up to and including the first level of type "none".
            0xb => (0..3).map(|n| at(n, true)).collect(),
            0xd => (0..63).map(|n| at(n, true)).filter(|found| found.subleaf < 2 || found.registers != [0; 4]).collect(),
            0x7 => (0..=self.highest_of_leaf_7()).map(|n| at(n, true)).collect(),
            0xf | 0x10 | 0x12 | 0x14 => vec![at(0, true)],
            _ => vec![at(0, false)],
        }
    }

    fn answer(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let mut registers = self.values(leaf, subleaf);
        for info in self.features().iter().filter(|info| (info.leaf, info.subleaf) == (leaf, subleaf)) {
            registers[info.register] |= 1 << info.bit;
        }
        if leaf == 0x8000_0001 && self.is_amd() {
            registers[EDX] |= self.answer(1, 0)[EDX] & AMD_REPEATED;
        }
        registers
    }

    /// The highest subleaf of leaf 7 that has a bit set.
    fn highest_of_leaf_7(&self) -> u32 {
        self.features().iter().filter(|info| info.leaf == 7).map(|info| info.subleaf).max().unwrap_or(0)
    }

    fn megahertz(&self) -> u32 {
        ((self.tsc_khz() + 500) / 1000) as u32 & 0xffff
    }

    /// What the answer holds besides feature bits.
    fn values(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        if let Some((_, registers)) = self.part.constants.iter().find(|(constant, _)| *constant == leaf) {
            return *registers;
        }
        match leaf {
            0x0 => vendor(self.is_amd(), self.part.highest_basic),
            // CLFLUSH lines of 64 bytes, one logical processor, APIC ID 0.
            0x1 => [self.part.signature, 8 << 8 | 1 << 16, 0, 0],
            0x4 | 0x8000_001d => self.caches(leaf).get(subleaf as usize).map_or([0; 4], super::Cache::describe),
            0x7 if subleaf == 0 => [self.highest_of_leaf_7(), 0, 0, 0],
            0xa if self.has(Feature::Pmu) && !self.is_amd() => PERFORMANCE_MONITORING,
            0xb => topology(subleaf),
            0xd => self.xsave(subleaf),
            0x15 => [CRYSTAL_KHZ, self.tsc_khz() as u32, CRYSTAL_KHZ * 1000, 0],
            0x16 => [self.megahertz(), self.megahertz(), 100, 0],
            EXTENDED => self.highest_extended(),
            0x8000_0001 if self.is_amd() => [self.part.signature, 4 << 28, 0, 0],
            0x8000_0002..=0x8000_0004 => self.brand(leaf),
            0x8000_0008 => [self.physical_bits() | LINEAR_BITS[usize::from(self.has(Feature::La57))] << 8, 0, 0, 0],
            // SVM revision 1 and the number of ASIDs.
            0x8000_000a if self.has(Feature::Svm) => [1, 0x8000, 0, 0],
            _ => [0; 4],
        }
    }

    /// The caches that `leaf` describes: leaf 4 is Intel's, leaf 8000001D comes with AMD's topology extensions.
    fn caches(&self, leaf: u32) -> &'static [super::Cache] {
        let described = if leaf == 4 { !self.is_amd() } else { self.is_amd() && self.has(Feature::Topoext) };
        if described {
            self.part.caches
        } else {
            &[]
        }
    }

    fn highest_extended(&self) -> [u32; 4] {
        if self.is_amd() {
            vendor(true, self.part.highest_extended)
        } else {
            [self.part.highest_extended, 0, 0, 0]
        }
    }

    fn brand(&self, leaf: u32) -> [u32; 4] {
        let mut text = [0u8; 48];
        text[..self.part.brand.len()].copy_from_slice(self.part.brand.as_bytes());
        let at = (leaf - 0x8000_0002) as usize * 16;
        std::array::from_fn(|n| word(&text[at + 4 * n..]))
    }

    /// Bits that XCR0 can have.
    pub fn xcr0_supported(&self) -> u64 {
        if !self.has(Feature::Xsave) {
            return 0;
        }
        self.components().fold(3, |mask, (bit, ..)| mask | 1 << bit)
    }

    /// Bytes of a standard-format XSAVE area that holds the components of `xcr0`.
    pub fn xsave_size(&self, xcr0: u64) -> u32 {
        let ends = self.components().filter(|(bit, ..)| xcr0 >> bit & 1 != 0).map(|(_, _, size, offset)| size + offset);
        ends.max().unwrap_or(XSAVE_LEGACY)
    }

    /// Bytes of a compacted XSAVE area that holds the components of `xcr0`.
    pub fn xsave_size_compacted(&self, xcr0: u64) -> u32 {
        let sizes = self.components().filter(|(bit, ..)| xcr0 >> bit & 1 != 0).map(|(_, _, size, _)| size);
        XSAVE_LEGACY + sizes.sum::<u32>()
    }

    fn components(&self) -> impl Iterator<Item = (u32, Feature, u32, u32)> + '_ {
        COMPONENTS.iter().copied().filter(|(_, feature, ..)| self.has(*feature))
    }

    /// Leaf D with XCR0 as after reset, which enables x87 alone.
    fn xsave(&self, subleaf: u32) -> [u32; 4] {
        let supported = self.xcr0_supported();
        if supported == 0 {
            return [0; 4];
        }
        match subleaf {
            0 => [supported as u32, self.xsave_size(1), self.xsave_size(supported), (supported >> 32) as u32],
            1 if self.has(Feature::Xsavec) => [0, self.xsave_size_compacted(1), 0, 0],
            1 => [0; 4],
            _ => self.components().find(|(bit, ..)| *bit == subleaf).map_or([0; 4], |(_, _, size, offset)| [size, offset, 0, 0]),
        }
    }
}

impl super::Cache {
    /// The cache in the encoding of leaf 4: self-initializing, not shared, 64-byte lines.
    fn describe(&self) -> [u32; 4] {
        const LINE: u32 = 64;
        [self.kind | self.level << 5 | 1 << 8, (LINE - 1) | (self.ways - 1) << 22, self.sets - 1, self.properties]
    }
}

/// Vendor string, with the highest leaf in EAX.
fn vendor(amd: bool, highest: u32) -> [u32; 4] {
    let name: &[u8; 12] = if amd { b"AuthenticAMD" } else { b"GenuineIntel" };
    let mut registers = [0; 4];
    (registers[EAX], registers[EBX], registers[EDX], registers[ECX]) = (highest, word(name), word(&name[4..]), word(&name[8..]));
    registers
}

/// Extended topology: one thread of one core, x2APIC ID 0.
fn topology(subleaf: u32) -> [u32; 4] {
    match subleaf {
        0 | 1 => [0, 1, subleaf | (subleaf + 1) << 8, 0],
        _ => [0, 0, subleaf & 0xff, 0],
    }
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epyc() -> Model {
        Model::new("epyc", &[]).unwrap()
    }

    #[test]
    fn vendors_sign_their_parts() {
        let intel = Model::default().cpuid(0, 0);
        assert_eq!(intel, [0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]);
        assert_eq!(epyc().cpuid(0, 0), [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]);
        assert_eq!(epyc().cpuid(EXTENDED, 0)[EBX..], epyc().cpuid(0, 0)[EBX..]);
    }

    #[test]
    fn leaves_out_of_range_follow_the_vendor() {
        let intel = Model::default();
        assert_eq!(intel.cpuid(0x4000_0000, 0), intel.cpuid(0x16, 0));
        assert_eq!(intel.cpuid(0x9000_0000, 0), intel.cpuid(0x16, 0));
        assert_eq!(epyc().cpuid(0x11, 0), [0; 4]);
        assert_eq!(epyc().cpuid(0x8fff_ffff, 0), [0; 4]);
    }

    #[test]
    fn features_set_their_bits() {
        assert_ne!(Model::default().cpuid(1, 0)[ECX] & 1 << 17, 0);
        let without = Model::new("cascadelake", &[("pcid".to_owned(), false)]).unwrap();
        assert_eq!(without.cpuid(1, 0)[ECX] & 1 << 17, 0);
        assert_eq!(epyc().cpuid(0x8000_0001, 0)[EDX] & 1, 1);
        assert_eq!(Model::default().cpuid(0x8000_0001, 0)[EDX] & 1, 0);
    }

    #[test]
    fn leaf_7_ends_with_its_last_features() {
        let leaves =
            |model: &Model| model.leaves().into_iter().filter(|found| found.leaf == 7).map(|found| found.registers).collect::<Vec<_>>();
        let [first, empty, last] = leaves(&Model::default())[..] else { panic!("subleaves 0 to 2") };
        assert_eq!((first[EAX], empty, last), (2, [0; 4], [0, 0, 0, 1 << 4]));
        let without = Model::new("cascadelake", &[("bhi-ctrl".to_owned(), false)]).unwrap();
        assert_eq!((leaves(&without).len(), without.cpuid(7, 0)[EAX]), (1, 0));
    }

    #[test]
    fn xsave_sizes_follow_the_components() {
        let intel = Model::default();
        assert_eq!(intel.cpuid(0xd, 0), [0x207, 576, 2696, 0]);
        assert_eq!(intel.cpuid(0xd, 1), [15, 576, 0, 0]);
        assert_eq!(intel.cpuid(0xd, 2), [256, 576, 0, 0]);
        assert_eq!(intel.cpuid(0xd, 9), [8, 2688, 0, 0]);
        let sse = Model::new("cascadelake", &[("avx".to_owned(), false), ("pku".to_owned(), false)]).unwrap();
        assert_eq!(sse.cpuid(0xd, 0), [3, 576, 576, 0]);
        let without = Model::new("cascadelake", &[("xsave".to_owned(), false)]).unwrap();
        assert_eq!(without.cpuid(0xd, 0), [0; 4]);
    }

    #[test]
    fn the_brand_is_text() {
        let text: Vec<u8> = (2..5).flat_map(|n| epyc().cpuid(EXTENDED + n, 0)).flat_map(u32::to_le_bytes).collect();
        assert_eq!(text.split(|byte| *byte == 0).next(), Some(&b"softkvm CPU (AMD EPYC, Rome)"[..]));
    }

    #[test]
    fn leaf_15_tells_the_frequency_that_the_clock_measures() {
        let frequency = |model: Model| {
            let [denominator, numerator, crystal, _] = model.cpuid(0x15, 0).map(u64::from);
            crystal * numerator / denominator
        };
        assert_eq!(frequency(Model::default()), crate::cpu::clock::host_tsc_khz() * 1000);
        assert_eq!(frequency(Model::default().with_tsc_khz(2_345_678)), 2_345_678_000);
    }

    #[test]
    fn cache_lists_end_with_an_empty_entry() {
        for (model, leaf) in [(Model::default(), 0x4), (epyc(), 0x8000_001d)] {
            let caches: Vec<_> = model.leaves().into_iter().filter(|found| found.leaf == leaf).collect();
            assert_eq!(caches.len(), 5);
            assert_eq!(caches[4].registers, [0; 4]);
        }
    }
}
