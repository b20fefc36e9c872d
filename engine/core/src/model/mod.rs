//! What distinguishes one CPU model from another: vendor, features, CPUID, MSR values.
//!
//! A model is a real part: it has the features that the part has and that the engine implements. Where the engine offers more than the
//! part did, `Part::added` says so.

pub mod cascadelake;
pub mod cpuid;
pub mod epyc;
pub mod features;
pub mod msrs;
pub mod silicon;

use std::fmt;

pub use features::{Feature, FeatureSet};
pub use silicon::Silicon;

use crate::cpu::clock::host_tsc_khz;
use crate::jit::Tier;
use crate::memory::nested::PHYSICAL_BITS;
use crate::paging::unused_bits;
use crate::state::cr4;
use features::{NEEDS, TABLE};

/// A cache as CPUID describes it (SDM vol. 2, leaf 4).
#[derive(Clone, Copy, Debug)]
pub struct Cache {
    /// 1 data, 2 instructions, 3 both.
    pub kind: u32,
    pub level: u32,
    pub ways: u32,
    pub sets: u32,
    /// Bits of EDX: 0 WBINVD does not reach lower levels, 1 inclusive, 2 complex indexing.
    pub properties: u32,
}

/// The tables of one real part.
pub struct Part {
    pub name: &'static str,
    pub amd: bool,
    /// CPUID.1.EAX: family, model and stepping.
    pub signature: u32,
    /// At most 47 characters.
    pub brand: &'static str,
    pub highest_basic: u32,
    pub highest_extended: u32,
    /// What the part has, whether the engine implements it or not.
    pub features: &'static [Feature],
    /// What the engine offers on top, because guests run better with it.
    pub added: &'static [Feature],
    pub caches: &'static [Cache],
    /// CPUID leaves that are plain numbers: leaf, answer.
    pub constants: &'static [(u32, [u32; 4])],
    /// MSRs that are plain numbers: index, value.
    pub msrs: &'static [(u32, u64)],
}

/// The parts that a model can be.
const PARTS: [&Part; 2] = [&cascadelake::PART, &epyc::PART];

/// Why there is no such model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelError {
    UnknownModel(String),
    UnknownFeature(String),
    /// The engine does not implement the feature.
    Unimplemented(Feature),
    /// The first feature was asked for, and needs the second, which is off.
    Contradiction(Feature, Feature),
}

impl fmt::Display for ModelError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ModelError::UnknownModel(name) => {
                let names: Vec<_> = Model::names().collect();
                write!(out, "no CPU model {name:?}{}; models: {}", suggestion(name, &names), names.join(", "))
            }
            ModelError::UnknownFeature(name) => {
                let names: Vec<_> = Model::feature_names().collect();
                write!(out, "no CPU feature {name:?}{}; features: {}", suggestion(name, &names), names.join(", "))
            }
            ModelError::Unimplemented(feature) => {
                let names: Vec<_> = Model::feature_names().collect();
                write!(out, "the engine does not implement CPU feature {:?}; features: {}", feature.name(), names.join(", "))
            }
            ModelError::Contradiction(feature, base) => {
                write!(out, "CPU feature {:?} needs {:?}, which is off", feature.name(), base.name())
            }
        }
    }
}

impl std::error::Error for ModelError {}

/// " (did you mean ...?)" for the name that is at most two edits away.
fn suggestion(wrong: &str, names: &[&str]) -> String {
    let near = names.iter().map(|name| (edits(wrong, name), name)).min().filter(|(edits, name)| *edits <= 2 && *edits < name.len());
    near.map_or(String::new(), |(_, name)| format!(" (did you mean {name:?}?)"))
}

/// Levenshtein distance.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// A CPU model with its features.
#[derive(Clone)]
pub struct Model {
    part: &'static Part,
    features: FeatureSet,
    /// Frequency of the TSC in kHz, if it is not the host's.
    tsc_khz: Option<u32>,
    tier: Tier,
}

impl Default for Model {
    /// The first part with what the engine implements of it.
    fn default() -> Self {
        let part = PARTS[0];
        Model { part, features: default_features(part), tsc_khz: None, tier: Tier::default() }
    }
}

/// What the engine offers of `part`.
fn default_features(part: &Part) -> FeatureSet {
    part.features.iter().chain(part.added).copied().filter(|feature| feature.info().available()).collect()
}

impl Model {
    /// The model called `name`, with features switched on and off by name.
    pub fn new(name: &str, switches: &[(String, bool)]) -> Result<Model, ModelError> {
        let found = PARTS.iter().find(|part| part.name.eq_ignore_ascii_case(name));
        let part = found.ok_or_else(|| ModelError::UnknownModel(name.to_owned()))?;
        let mut features = default_features(part);
        let mut wanted = Vec::new();
        for (name, on) in switches {
            let feature = Feature::by_name(name).ok_or_else(|| ModelError::UnknownFeature(name.clone()))?;
            match (on, feature.info().available()) {
                (true, false) => return Err(ModelError::Unimplemented(feature)),
                (true, true) => features.insert(feature),
                (false, _) => features.remove(feature),
            }
            if *on {
                wanted.push(feature);
            }
        }
        drop_orphans(&mut features, &wanted)?;
        Ok(Model { part, features, tsc_khz: None, tier: Tier::default() })
    }

    /// The same part, whose cores run code as `tier` says.
    pub fn with_tier(self, tier: Tier) -> Model {
        Model { tier, ..self }
    }

    /// How cores run code.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// The same part with a TSC of `khz`, for a core whose time is virtual.
    pub fn with_tsc_khz(self, khz: u32) -> Model {
        Model { tsc_khz: Some(khz), ..self }
    }

    /// Frequency of the TSC in kHz.
    pub fn tsc_khz(&self) -> u64 {
        self.tsc_khz.map_or_else(host_tsc_khz, u64::from)
    }

    /// Names of the models.
    pub fn names() -> impl Iterator<Item = &'static str> {
        PARTS.iter().map(|part| part.name)
    }

    /// Names of the features that can be switched on.
    pub fn feature_names() -> impl Iterator<Item = &'static str> {
        TABLE.iter().filter(|info| info.available()).map(|info| info.name)
    }

    pub fn name(&self) -> &'static str {
        self.part.name
    }

    /// Whether this is AMD silicon.
    #[inline]
    pub fn is_amd(&self) -> bool {
        self.part.amd
    }

    /// Whose undefined flags and results it has.
    #[inline]
    pub fn silicon(&self) -> Silicon {
        if self.part.amd {
            Silicon::Amd
        } else {
            Silicon::Intel
        }
    }

    /// Whether VM exits save the address of the next instruction (SVM's NRIPS).
    pub fn saves_next_rip(&self) -> bool {
        self.has(Feature::NripSave)
    }

    /// Bits of a physical address.
    pub fn physical_bits(&self) -> u32 {
        PHYSICAL_BITS
    }

    /// Upper bits of an address that the widest linear address does not have.
    pub fn unused_address_bits(&self) -> u8 {
        unused_bits(if self.has(Feature::La57) { cr4::LA57 } else { 0 })
    }

    /// Whether the model has `feature`.
    #[inline]
    pub fn has(&self, feature: Feature) -> bool {
        self.features.contains(feature)
    }

    /// The features that are on.
    pub fn features(&self) -> &FeatureSet {
        &self.features
    }
}

/// Removes features whose base is off, until none is left; one that was asked for by name is an error.
fn drop_orphans(features: &mut FeatureSet, wanted: &[Feature]) -> Result<(), ModelError> {
    while let Some(&(feature, base)) = NEEDS.iter().find(|(feature, base)| features.contains(*feature) && !features.contains(*base)) {
        if wanted.contains(&feature) {
            return Err(ModelError::Contradiction(feature, base));
        }
        features.remove(feature);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn switched(name: &str, on: bool) -> Result<Model, ModelError> {
        Model::new("cascadelake", &[(name.to_owned(), on)])
    }

    #[test]
    fn features_switch_by_name() {
        assert!(Model::default().has(Feature::Pcid));
        assert!(!switched("pcid", false).unwrap().has(Feature::Pcid));
        assert!(!switched("xsave", false).unwrap().has(Feature::Xsaveopt));
        let both = [("xsave".to_owned(), false), ("xsavec".to_owned(), true)];
        assert_eq!(Model::new("cascadelake", &both).err(), Some(ModelError::Contradiction(Feature::Xsavec, Feature::Xsave)));
    }

    #[test]
    fn next_rip_saving_belongs_to_amd_and_can_be_switched_off() {
        assert!(!Model::default().saves_next_rip());
        assert!(Model::new("epyc", &[]).unwrap().saves_next_rip());
        assert!(!Model::new("epyc", &[("nrip-save".to_owned(), false)]).unwrap().saves_next_rip());
    }

    #[test]
    fn errors_name_what_exists() {
        let text = |error: Option<ModelError>| error.unwrap().to_string();
        let unknown = text(Model::new("cascadelak", &[]).err());
        assert_eq!(unknown, r#"no CPU model "cascadelak" (did you mean "cascadelake"?); models: cascadelake, epyc"#);
        assert!(
            text(switched("fsgbase", true).err()).starts_with(r#"no CPU feature "fsgbase" (did you mean "fsgsbase"?); features: fpu, "#)
        );
        assert!(text(switched("avx512f", true).err()).starts_with(r#"the engine does not implement CPU feature "avx512f"; features: "#));
        assert!(!text(Model::new("z80", &[]).err()).contains("did you mean"));
        assert!(switched("avx512f", false).is_ok());
    }

    #[test]
    fn distance_counts_edits() {
        assert_eq!((edits("", "abc"), edits("kitten", "sitting"), edits("same", "same")), (3, 3, 0));
    }
}
