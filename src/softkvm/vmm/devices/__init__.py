"""The chips of the PC that KVM leaves to its VMM, one per file: registers, behaviour, saved state."""
