"""Every kind of task, one file each: its version, what it is told, what it reads and what it gives."""
