//! What distinguishes one CPU model from another: vendor, features, MSR values.

/// A CPU model with its features.
#[derive(Default)]
pub struct Model {
    amd: bool,
}

impl Model {
    /// Whether this is AMD silicon.
    pub fn is_amd(&self) -> bool {
        self.amd
    }
    /// Whether VM exits save the address of the next instruction (SVM's NRIPS).
    pub fn saves_next_rip(&self) -> bool {
        self.amd
    }
    /// Bits of a physical address.
    pub fn physical_bits(&self) -> u32 {
        46
    }
}
