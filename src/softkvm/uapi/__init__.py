"""Binary interfaces: ioctl numbers, structure layouts, message ids. Pure data, imports nothing of the project."""
