#!/bin/busybox sh
# Called by udhcpc: puts a lease on the interface, takes it off again.
# shellcheck disable=SC2154  # udhcpc sets interface, ip, mask, router and dns
case $1 in
  deconfig)
    ip addr flush dev "$interface" 2>/dev/null
    ip link set "$interface" up
    ;;
  bound | renew)
    ip addr replace "$ip/${mask:-24}" dev "$interface"
    # The first interface's gateway wins: later ones have a higher metric.
    metric=$(cat "/sys/class/net/$interface/ifindex")
    for gateway in $router; do
      ip route replace default via "$gateway" dev "$interface" metric "$metric"
    done
    for server in $dns; do echo "nameserver $server"; done > /etc/resolv.conf
    ;;
esac
