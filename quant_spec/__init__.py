"""What every package is told, as typed records without torch."""
