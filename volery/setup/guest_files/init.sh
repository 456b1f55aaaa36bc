#!/bin/busybox sh
# The guest's first process: mounts, modules, a name, the network, the guest agent, a shell.
export PATH=/bin:/sbin:/usr/sbin HOME=/root TERM=linux
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts && mount -t devpts devpts /dev/pts
mount -t tmpfs -o size=16m tmpfs /run

argument() {  # argument NAME: its value on the kernel's command line
  for word in $(cat /proc/cmdline); do
    case $word in "$1"=*) echo "${word#*=}"; return ;; esac
  done
}

while read -r module; do insmod "/lib/modules/$module" 2>/dev/null; done < /lib/modules/order
echo online > /sys/devices/system/memory/auto_online_blocks 2>/dev/null
ip link set lo up

# A virtio or SCSI disk shows up shortly after its driver.
for _ in 1 2 3 4 5 6 7 8 9 10; do
  [ -n "$(ls /sys/block)" ] && break
  usleep 50000
done

by_label() {  # by_label LABEL DIRECTORY: mounts the file system with this label there
  device=$(findfs "LABEL=$1" 2>/dev/null) && mkdir -p "$2" && mount "$device" "$2" 2>/dev/null
}
by_label volery-data /data
by_label volery-tick /mnt
for disc in /dev/sr*; do
  [ -b "$disc" ] && mkdir -p /cidata && mount -t iso9660 -o ro "$disc" /cidata 2>/dev/null && break
done

# The name: what the administrator says for this boot, then what the manager says, then a default.
from_smbios() {
  [ "$(cat /sys/class/dmi/id/sys_vendor)" = Volery ] && cat /sys/class/dmi/id/product_family
}
from_disc() { sed -n 's/^local-hostname: *//p' /cidata/meta-data; }
from_firmware() { cat /sys/firmware/qemu_fw_cfg/by_name/opt/volery/hostname/raw; }
name=
for source in "argument host" from_disc from_firmware from_smbios "echo volery-guest"; do
  name=$($source 2>/dev/null | tr -dc 'A-Za-z0-9.-' | cut -c 1-63)
  [ -n "$name" ] && break
done
hostname "$name"
printf '127.0.0.1 localhost %s\n::1 localhost %s\n' "$name" "$name" > /etc/hosts

address=$(argument ip4)
if [ -n "$address" ]; then
  ip link set eth0 up
  ip addr add "$address" dev eth0
  : > /run/dhcp.eth0
fi

# Ask for a restart of what ends: the guest agent, the shells.
( while :; do
    for port in /sys/class/virtio-ports/*; do
      [ "$(cat "$port/name" 2>/dev/null)" = org.qemu.guest_agent.0 ] &&
        qemu-ga -m virtio-serial -p "/dev/${port##*/}" -t /run -l /run/qemu-ga.log
    done
    sleep 1
  done ) &
acpid -l /run/acpid.log

mkdir -p /run/www && echo "$name" > /run/www/index.html
httpd -p 80 -h /run/www

# Once a second: the counter, and what was plugged in or out meanwhile.
( count=0
  while :; do
    count=$((count + 1))
    echo $count >> /run/tick
    for disk in /data /mnt; do
      [ -f $disk/tick ] && echo $count >> $disk/tick && sync $disk/tick
    done
    for cpu in /sys/devices/system/cpu/cpu*/online; do
      [ "$(cat "$cpu" 2>/dev/null)" = 0 ] && echo 1 > "$cpu"
    done
    for nic in /sys/class/net/eth*; do
      nic=${nic##*/}
      [ -e "/sys/class/net/$nic" ] && [ ! -e "/run/dhcp.$nic" ] && ip link set "$nic" up &&
        udhcpc -b -i "$nic" -x "hostname:$name" -s /lib/dhcp.sh -p "/run/dhcp.$nic" -t 5 -T 1 -A 5 \
          > /dev/null 2>&1 &
    done
    for started in /run/dhcp.*; do
      nic=${started##*.}
      [ -e "$started" ] && [ ! -e "/sys/class/net/$nic" ] && {
        kill "$(cat "$started")" 2>/dev/null
        rm -f "$started"
      }
    done
    sleep 1
  done ) &

# A disk that begins with "volery-ledger" gets a sector four times a second: its number, this boot, how long it is up.
# Whoever reads it sees from the disk alone which boots of this guest wrote, and when (trials/ledger.py).
( for disk in /dev/vd?; do
    [ "$(head -c 13 "$disk" 2>/dev/null)" = volery-ledger ] || continue
    sector=$(tr -d '\000' < "$disk" | wc -l)
    boot=$(cat /proc/sys/kernel/random/boot_id)
    while printf '%-511s\n' "$sector $boot $(cut -d ' ' -f 1 /proc/uptime)" |
        dd of="$disk" bs=512 seek="$sector" conv=notrunc,fsync 2>/dev/null; do
      sector=$((sector + 1))
      usleep 250000
    done
  done ) &

echo "$name is up after $(cut -d ' ' -f 1 /proc/uptime) s" | tee /dev/ttyS0 > /run/up 2>/dev/null
export PS1='\h:\w# '
( while :; do setsid sh -c 'exec sh < /dev/tty1 > /dev/tty1 2>&1'; sleep 1; done ) &
while :; do setsid cttyhack sh; sleep 1; done
