//! `softkvm._engine`: the silicon as Python objects. The only crate that knows Python.
//!
//! Every class is frozen and every method may be called from any thread; what changes does so behind atomics and mutexes.
//! `src/softkvm/_engine.pyi` declares the same names with types.

mod block;
mod bug;
mod core;
mod handover;
mod layout;
mod logging;
mod memory;
mod model;
mod nested;
mod posted;
mod processors;
mod wakeup;

use pyo3::prelude::*;

/// The engine: a CPU with virtual machine extensions, in software.
#[pymodule]
mod _engine {
    use std::collections::BTreeMap;

    use pyo3::prelude::*;
    use softkvm_engine::cpu::clock::{host_tsc, host_tsc_khz};
    use softkvm_engine::jit;
    use softkvm_engine::model::Model;

    #[pymodule_export]
    use crate::block::ControlBlock;
    #[pymodule_export]
    use crate::bug::EngineBug;
    #[pymodule_export]
    use crate::core::Core;
    #[pymodule_export]
    use crate::layout::control_layout;
    #[pymodule_export]
    use crate::memory::Memory;
    #[pymodule_export]
    use crate::model::Model as PyModel;
    #[pymodule_export]
    use crate::nested::NestedPageTable;
    #[pymodule_export]
    use crate::posted::{IpiTable, PostedInterrupts};
    #[pymodule_export]
    use crate::wakeup::Wakeup;

    #[pymodule_init]
    fn init(_module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::bug::install_hook();
        crate::logging::install();
        Ok(())
    }

    /// Names of the CPU models.
    #[pyfunction]
    fn model_names() -> Vec<&'static str> {
        Model::names().collect()
    }

    /// Names of the CPU features that the engine implements.
    #[pyfunction]
    fn feature_names() -> Vec<&'static str> {
        Model::feature_names().collect()
    }

    /// The host's time stamp counter now.
    #[pyfunction]
    fn tsc() -> u64 {
        host_tsc()
    }

    /// Frequency of `tsc()` in kHz.
    #[pyfunction]
    fn tsc_khz(py: Python<'_>) -> u64 {
        py.detach(host_tsc_khz)
    }

    /// What this binary is: version, build profile, target architecture, and what makes host code or why nothing does.
    #[pyfunction]
    fn build_info() -> BTreeMap<&'static str, String> {
        let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
        let target = std::env::consts::ARCH;
        let known = [("version", env!("CARGO_PKG_VERSION")), ("profile", profile), ("target", target)];
        known.map(|(key, value)| (key, value.into())).into_iter().chain([("translator", jit::describe())]).collect()
    }
}
