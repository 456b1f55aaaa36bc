"""What tests start for real: guests, private libvirt daemons."""
