"""`softkvm perf` and `softkvm trace branches`: profiling a guest from outside, without the guest knowing."""
