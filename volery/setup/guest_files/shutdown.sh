#!/bin/busybox sh
# /sbin/shutdown, as the guest agent calls it, and what the power button does.
sync
umount /mnt /data 2>/dev/null
case "$*" in
  *-r*) exec reboot -f ;;
  *-H*) exec halt -f ;;
  *) exec poweroff -f ;;
esac
