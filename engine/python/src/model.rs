//! CPU models.

use std::collections::BTreeMap;
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::jit::{self, Tier};
use softkvm_engine::{decode, model};

/// leaf, subleaf, whether the subleaf matters, EAX, EBX, ECX, EDX
type Leaf = (u32, u32, bool, u32, u32, u32, u32);

/// A CPU model by name, with features switched on and off by name; `tsc_khz` is its TSC's frequency if that is not the host's, `tier` how
/// its cores run code.
///
/// Raises ValueError, which lists the names that exist, for an unknown name, a feature that the engine lacks, or a
/// translator on a host that has none.
#[pyclass(frozen, module = "softkvm._engine")]
pub struct Model {
    pub model: Arc<model::Model>,
}

#[pymethods]
impl Model {
    #[new]
    #[pyo3(signature = (name, features=None, tsc_khz=None, tier="auto"))]
    fn new(name: &str, features: Option<BTreeMap<String, bool>>, tsc_khz: Option<u32>, tier: &str) -> PyResult<Self> {
        let switches: Vec<_> = features.unwrap_or_default().into_iter().collect();
        let model = model::Model::new(name, &switches).map_err(|error| PyValueError::new_err(error.to_string()))?;
        let model = match tsc_khz {
            Some(khz) => model.with_tsc_khz(khz),
            None => model,
        };
        let tiers = Tier::NAMES.map(|(name, _)| name).join(", ");
        let found = Tier::NAMES.into_iter().find(|(name, _)| *name == tier);
        let (_, tier) = found.ok_or_else(|| PyValueError::new_err(format!("no tier is called {tier}: there are {tiers}")))?;
        if tier == Tier::Translator {
            jit::check().map_err(|error| PyValueError::new_err(format!("{error}: use tier interpreter or auto")))?;
        }
        Ok(Model { model: Arc::new(model.with_tier(tier)) })
    }

    /// Name of the model.
    #[getter]
    fn name(&self) -> &'static str {
        self.model.name()
    }

    /// "intel" or "amd".
    #[getter]
    fn vendor(&self) -> &'static str {
        if self.model.is_amd() {
            "amd"
        } else {
            "intel"
        }
    }

    /// Names of the features that are on.
    #[getter]
    fn features(&self) -> Vec<&'static str> {
        self.model.features().iter().map(|info| info.name).collect()
    }

    /// What CPUID answers: EAX, EBX, ECX, EDX.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> (u32, u32, u32, u32) {
        self.model.cpuid(leaf, subleaf).into()
    }

    /// Every leaf and subleaf: leaf, subleaf, whether the subleaf matters, EAX, EBX, ECX, EDX.
    fn leaves(&self) -> Vec<Leaf> {
        let flat = |found: model::cpuid::Leaf| {
            let [eax, ebx, ecx, edx] = found.registers;
            (found.leaf, found.subleaf, found.indexed, eax, ebx, ecx, edx)
        };
        self.model.leaves().into_iter().map(flat).collect()
    }

    /// Length of the instruction that `code` begins with, as the CPU decodes it in code segments of 16, 32 or 64 bits; None if there is
    /// no such instruction, or if it goes on behind the end.
    fn instruction_length(&self, code: &[u8], bits: u32) -> PyResult<Option<usize>> {
        let size = match bits {
            16 => CodeSize::Bits16,
            32 => CodeSize::Bits32,
            64 => CodeSize::Bits64,
            _ => return Err(PyValueError::new_err("code segments have 16, 32 or 64 bits")),
        };
        Ok(decode::length(code, size, &self.model))
    }

    /// MSR values of the model by index.
    fn msrs(&self) -> BTreeMap<u32, u64> {
        self.model.msrs()
    }
}
