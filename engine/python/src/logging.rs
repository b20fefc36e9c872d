//! The engine's log goes to Python's logger "softkvm.engine".

use log::{Level, LevelFilter, Log, Metadata, Record};
use pyo3::prelude::*;

struct PythonLog;

/// Routes the engine's log; called once, when the module is imported.
pub fn install() {
    // Fails only when the module is imported again in the same process, where the logger is in place already.
    if log::set_logger(&PythonLog).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

impl Log for PythonLog {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        Python::attach(|py| {
            if let Err(error) = emit(py, record) {
                error.write_unraisable(py, None);
            }
        });
    }

    fn flush(&self) {}
}

fn emit(py: Python<'_>, record: &Record<'_>) -> PyResult<()> {
    let level = match record.level() {
        Level::Error => 40,
        Level::Warn => 30,
        Level::Info => 20,
        Level::Debug | Level::Trace => 10,
    };
    let logger = py.import("logging")?.call_method1("getLogger", ("softkvm.engine",))?;
    logger.call_method1("log", (level, "%s", record.args().to_string()))?;
    Ok(())
}
