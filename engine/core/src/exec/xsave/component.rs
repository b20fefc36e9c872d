//! State components: what each bit of XCR0 saves, and where (SDM vol. 1, 13.4 and 13.5).

use super::fxsave::{get_x87, get_xmm, put_x87, put_xmm, LEGACY_SIZE};
use crate::cpu::Cpu;
use crate::state::Fpu;

/// Bits of XCR0 and of the header's bitmaps.
pub mod bit {
    pub const X87: u64 = 1 << 0;
    pub const SSE: u64 = 1 << 1;
    pub const AVX: u64 = 1 << 2;
    pub const OPMASK: u64 = 1 << 5;
    pub const ZMM_HIGH: u64 = 1 << 6;
    pub const ZMM_16_31: u64 = 1 << 7;
    pub const PKRU: u64 = 1 << 9;
    pub const AVX512: u64 = OPMASK | ZMM_HIGH | ZMM_16_31;
}

/// Bytes of the header behind the legacy region.
pub const HEADER_SIZE: usize = 64;
/// Where extended components begin in the compacted format.
pub const EXTENDED: usize = LEGACY_SIZE + HEADER_SIZE;
/// Bytes of the largest area in the standard format.
pub const AREA_MAX: usize = 2696;

/// A component outside the legacy region.
pub struct Component {
    pub bit: u64,
    /// Place in the standard format, as CPUID leaf D tells it.
    pub offset: usize,
    pub size: usize,
    put: fn(&Fpu, usize, &mut [u8]),
    get: fn(&mut Fpu, usize, &[u8]),
}

/// The extended components, lowest bit first.
pub const EXTENDED_COMPONENTS: [Component; 5] = [
    Component {
        bit: bit::AVX,
        offset: 576,
        size: 256,
        put: |fpu, count, area| copy_out(&fpu.vector[..count], 16..32, area),
        get: |fpu, count, area| copy_in(&mut fpu.vector[..count], 16..32, area),
    },
    Component {
        bit: bit::OPMASK,
        offset: 1088,
        size: 64,
        put: |fpu, _, area| area.chunks_exact_mut(8).zip(fpu.mask).for_each(|(slot, mask)| slot.copy_from_slice(&mask.to_le_bytes())),
        get: |fpu, _, area| area.chunks_exact(8).zip(&mut fpu.mask).for_each(|(slot, mask)| *mask = u64::from_le_bytes(array(slot))),
    },
    Component {
        bit: bit::ZMM_HIGH,
        offset: 1152,
        size: 512,
        put: |fpu, count, area| copy_out(&fpu.vector[..count], 32..64, area),
        get: |fpu, count, area| copy_in(&mut fpu.vector[..count], 32..64, area),
    },
    Component {
        bit: bit::ZMM_16_31,
        offset: 1664,
        size: 1024,
        put: |fpu, _, area| copy_out(&fpu.vector[16..], 0..64, area),
        get: |fpu, _, area| copy_in(&mut fpu.vector[16..], 0..64, area),
    },
    Component {
        bit: bit::PKRU,
        offset: 2688,
        size: 8,
        put: |fpu, _, area| area.copy_from_slice(&u64::from(fpu.pkru).to_le_bytes()),
        get: |fpu, _, area| fpu.pkru = u64::from_le_bytes(array(area)) as u32,
    },
];

fn array(bytes: &[u8]) -> [u8; 8] {
    let mut array = [0; 8];
    array.copy_from_slice(bytes);
    array
}

fn copy_out(registers: &[[u8; 64]], part: std::ops::Range<usize>, area: &mut [u8]) {
    for (register, slot) in registers.iter().zip(area.chunks_exact_mut(part.len())) {
        slot.copy_from_slice(&register[part.clone()]);
    }
}

fn copy_in(registers: &mut [[u8; 64]], part: std::ops::Range<usize>, area: &[u8]) {
    for (register, slot) in registers.iter_mut().zip(area.chunks_exact(part.len())) {
        register[part.clone()].copy_from_slice(slot);
    }
}

impl Component {
    /// Writes the component to its slot; `count` vector registers of it.
    pub fn put(&self, fpu: &Fpu, count: usize, area: &mut [u8]) {
        (self.put)(fpu, count, area);
    }

    /// Loads the component from its slot.
    pub fn get(&self, fpu: &mut Fpu, count: usize, area: &[u8]) {
        (self.get)(fpu, count, area);
    }

    /// Puts the component into its initial configuration, which is all zeros.
    pub fn reset(&self, fpu: &mut Fpu, count: usize) {
        (self.get)(fpu, count, &[0; 1024][..self.size]);
    }
}

/// Places of the extended components of `mask` in an area; `compacted` when they follow each other without gaps.
pub fn places(mask: u64, compacted: bool) -> impl Iterator<Item = (&'static Component, usize)> {
    EXTENDED_COMPONENTS.iter().filter(move |component| mask & component.bit != 0).scan(EXTENDED, move |next, component| {
        let at = if compacted { *next } else { component.offset };
        *next = at + component.size;
        Some((component, at))
    })
}

/// Bytes of an area that has room for the components of `mask`.
pub fn area_size(mask: u64, compacted: bool) -> usize {
    places(mask, compacted).last().map_or(EXTENDED, |(component, at)| at + component.size)
}

impl Cpu {
    /// Components that are not in their initial configuration (XINUSE). MXCSR does not count.
    pub(super) fn components_in_use(&self) -> u64 {
        let fpu = &self.state.fpu;
        let count = self.xmm_count();
        let mut x87 = [0; LEGACY_SIZE];
        put_x87(fpu, &mut x87, true);
        let mut initial = [0; LEGACY_SIZE];
        put_x87(&Fpu::default(), &mut initial, true);
        let mut xmm = [0; LEGACY_SIZE];
        put_xmm(fpu, &mut xmm, count);
        let extended = EXTENDED_COMPONENTS.iter().fold(0, |used, component| {
            let mut slot = [0; 1024];
            component.put(fpu, count, &mut slot[..component.size]);
            used | if slot.iter().any(|byte| *byte != 0) { component.bit } else { 0 }
        });
        let x87 = if x87 != initial { bit::X87 } else { 0 };
        let sse = if xmm.iter().any(|byte| *byte != 0) { bit::SSE } else { 0 };
        x87 | sse | extended
    }

    /// Loads or resets the legacy components of `mask` but MXCSR: `present` ones from `image`, the others initial.
    pub(super) fn restore_legacy(&mut self, mask: u64, present: u64, image: &[u8], wide: bool) {
        let count = self.xmm_count();
        if mask & present & bit::X87 != 0 {
            get_x87(self, image, wide);
        } else if mask & bit::X87 != 0 {
            self.state.fpu.st = Fpu::default().st;
            self.initialize_x87();
        }
        if mask & present & bit::SSE != 0 {
            get_xmm(&mut self.state.fpu, image, count);
        } else if mask & bit::SSE != 0 {
            get_xmm(&mut self.state.fpu, &[0; LEGACY_SIZE], count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Model;

    #[test]
    fn places_are_those_of_cpuid() {
        let model = Model::default();
        for component in &EXTENDED_COMPONENTS {
            let [size, offset, ..] = model.cpuid(0xd, component.bit.trailing_zeros());
            if size != 0 {
                assert_eq!((size as usize, offset as usize), (component.size, component.offset));
            }
        }
        assert_eq!(model.xsave_size(model.xcr0_supported()) as usize, area_size(model.xcr0_supported(), false));
    }

    #[test]
    fn compacted_components_leave_no_gap() {
        let found: Vec<usize> = places(bit::OPMASK | bit::PKRU, true).map(|(_, at)| at).collect();
        assert_eq!(found, [EXTENDED, EXTENDED + 64]);
        assert_eq!(area_size(bit::X87 | bit::SSE, true), EXTENDED);
        assert_eq!(area_size(u64::MAX, false), AREA_MAX);
    }
}
