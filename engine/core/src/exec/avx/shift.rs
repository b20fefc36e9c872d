//! Shifts by a count of each lane: VPSLLVD, VPSRLVQ, VPSRAVD and siblings (SDM vol. 2).

use crate::exec::sse::form::operations;
use crate::exec::sse::lanes::{build, zip, Lane};

operations! {
    Vpsllvd => |a, b| zip(a, b, |x: u32, count: u32| x.checked_shl(count).unwrap_or(0));
    Vpsllvq => |a, b| zip(a, b, |x: u64, count: u64| if count < 64 { x << count } else { 0 });
    Vpsrlvd => |a, b| zip(a, b, |x: u32, count: u32| x.checked_shr(count).unwrap_or(0));
    Vpsrlvq => |a, b| zip(a, b, |x: u64, count: u64| if count < 64 { x >> count } else { 0 });
    Vpsravd => |a, b| build(|n| i32::get(&a, n) >> u32::get(&b, n).min(31));
}
