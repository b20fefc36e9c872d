"""What Linux gives KVM: kernel entry, tasks, clocks and timers."""
