"""What lies in the small guest image besides the distribution's own programs: init and its scripts."""
