#!/bin/sh
# Makes this machine able to run Volery: system packages that are missing, and .venv from the lock file.
#
#   deploy/bootstrap.sh run    what an installation needs            (make up)
#   deploy/bootstrap.sh test   also what tests, checks and the lab need (make test, check, lab, bench)
#   deploy/bootstrap.sh venv   only .venv, with everything, without system packages (make fmt, lock)
#
# Repeating it does nothing that is already right. It starts and configures no service.
set -eu

purpose=${1:-run}
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=$root/.venv

say() { printf '%s\n' "$*"; }
fail() {
  printf 'Volery: %s\n' "$*" >&2
  exit 1
}

case $purpose in
  run) lock=$root/requirements.lock ;;
  test | venv) lock=$root/requirements-dev.lock ;;
  *) fail "unknown purpose '$purpose': use run, test or venv." ;;
esac

# --- which system ---------------------------------------------------------------------------

[ -r /etc/os-release ] || fail "this system has no /etc/os-release, so it can't be told which packages to install."
ID='' ID_LIKE='' PRETTY_NAME=''
# shellcheck source=/dev/null
. /etc/os-release
family=
for word in $ID $ID_LIKE; do
  case $word in
    debian | ubuntu) family=debian ;;
    rhel | centos | ol | rocky | almalinux | fedora) family=el ;;
  esac
  [ -z "$family" ] || break
done

# One package in a line: family, purpose, name, what for.
packages() {
  cat <<'TABLE'
debian run  ca-certificates            certificates of package mirrors
debian run  python3                    Volery's language
debian run  python3-venv               its virtual environment
debian run  python3-dev                builds libvirt's Python module
debian run  gcc                        builds libvirt's Python module
debian run  pkg-config                 builds libvirt's Python module
debian run  libvirt-dev                builds libvirt's Python module
debian run  libvirt-daemon-system      runs virtual machines
debian run  libvirt-daemon-driver-qemu runs virtual machines
debian run  libvirt-clients            virsh, to look at them without Volery
debian run  qemu-system-x86            the machines themselves
debian run  qemu-utils                 disk images
debian run  qemu-block-extra           disks on iSCSI
debian run  libiscsi-bin               finds disks on iSCSI
debian run  postgresql                 the database's programs (no system-wide server)
debian run  dnsmasq-base               addresses for virtual machines
debian run  iproute2                   bridges and tunnels
debian run  nftables                   networks of virtual machines
debian run  kmod                       modules of the guest image's kernel
debian run  e2fsprogs                  the guest image's data partition
debian run  dosfstools                 the guest image's boot partition
debian run  mtools                     the guest image's boot partition
debian run  syslinux                   the guest image's boot loader
debian run  syslinux-common            the guest image's boot loader
debian run  zstd                       compressed kernel modules
debian run  fence-agents               power through hosts' BMCs
debian run  ipmitool                   power through IPMI
debian run  sanlock                    leases of virtual machines on shared storage
debian run  libvirt-sanlock            makes virtual machines hold them
debian test tgt                        an iSCSI target
debian test xorriso                    discs for guests
debian test cpio                       looks into the guest image
debian test busybox-static             guests of tests
debian test iputils-ping               who reaches whom in the lab
debian test openipmi                   BMCs of the lab's hosts
debian test openssl                    their certificate
debian test podman                     runs docker-compose.yml
debian test podman-compose             runs docker-compose.yml
debian test buildah                    builds its image
debian test crun                       runs its containers
debian test netavark                   their network
debian test aardvark-dns               their names
debian test debootstrap                their base image
el     run  ca-certificates            certificates of package mirrors
el     run  python3.11                 Volery's language
el     run  python3.11-devel           builds libvirt's Python module
el     run  python3.11-pip             installs Python packages
el     run  gcc                        builds libvirt's Python module
el     run  pkgconf-pkg-config         builds libvirt's Python module
el     run  libvirt-devel              builds libvirt's Python module
el     run  libvirt-daemon-kvm         runs virtual machines
el     run  libvirt-client             virsh, to look at them without Volery
el     run  qemu-kvm                   the machines themselves
el     run  qemu-img                   disk images
el     run  libiscsi-utils             finds disks on iSCSI
el     run  postgresql-server          the database's programs (no system-wide server)
el     run  dnsmasq                    addresses for virtual machines
el     run  iproute                    bridges and tunnels
el     run  nftables                   networks of virtual machines
el     run  kmod                       modules of the guest image's kernel
el     run  e2fsprogs                  the guest image's data partition
el     run  dosfstools                 the guest image's boot partition
el     run  mtools                     the guest image's boot partition
el     run  syslinux                   the guest image's boot loader
el     run  cpio                       unpacks packages
el     run  zstd                       compressed kernel modules
el     run  sanlock                    leases of virtual machines on shared storage
el     run  libvirt-daemon-plugin-sanlock makes virtual machines hold them
el     run  dnf-plugins-core           fetches packages without installing them
el     run  fence-agents-ipmilan       power through hosts' BMCs
el     run  fence-agents-redfish       power through hosts' BMCs
el     run  ipmitool                   power through IPMI
el     test scsi-target-utils          an iSCSI target
el     test xorriso                    discs for guests
el     test iputils                    who reaches whom in the lab
el     test OpenIPMI-lanserv           BMCs of the lab's hosts
el     test openssl                    their certificate
el     test podman                     runs docker-compose.yml
el     test podman-compose             runs docker-compose.yml
TABLE
}

# Lines "name what-for" of the packages for this purpose that aren't installed.
missing() {
  packages | while read -r of purpose_of name reason; do
    [ "$of" = "$family" ] || continue
    [ "$purpose_of" = run ] || [ "$purpose" = test ] || continue
    case $installed in *" $name "*) ;; *) say "$name $reason" ;; esac
  done
}

installed_debian() {
  # shellcheck disable=SC2046  # one word per package
  dpkg-query -W -f '${db:Status-Status} ${Package}\n' $(packages | awk '{ print $3 }') 2>/dev/null |
    awk '$1 == "installed" { printf " %s ", $2 }'
}
installed_el() {
  # shellcheck disable=SC2046  # one word per package
  rpm -q --whatprovides --qf '%{NAME}\n' $(packages | awk '{ print $3 }') 2>/dev/null |
    awk 'NF == 1 { printf " %s ", $1 }'
}

# --- installing them ------------------------------------------------------------------------

log=$(mktemp)
restore=
finish() {
  # PostgreSQL's own setting is put back, whatever happened.
  [ -z "$restore" ] || mv -f "$restore" "${restore%.volery-saved}"
  rm -f "$log"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Runs a package manager; shows each package as it is set up, and everything when it fails.
install_with() {
  pattern=$1
  shift
  { "$@" 2>&1 || say "exit-status $?"; } | while IFS= read -r line; do
    printf '%s\n' "$line" >> "$log"
    case $line in
      $pattern*) line=${line#"$pattern"} && say "  ${line%% (*}" ;;
    esac
  done
  if grep -q '^exit-status' "$log"; then
    tail -n 25 "$log" >&2
    fail "'$*' failed; its last lines are above. Mend that and run the same command again."
  fi
}

install_debian() {
  export DEBIAN_FRONTEND=noninteractive
  say "Reading the package lists"
  install_with "Err:" apt-get -q -o DPkg::Lock::Timeout=300 update
  set -- apt-get -q -y --no-install-recommends -o DPkg::Lock::Timeout=300 install
  case " $names " in
    *" postgresql "*)
      # Debian makes and starts a system-wide database unless told not to. Volery runs its own.
      install_with "Setting up " "$@" postgresql-common
      conf=/etc/postgresql-common/createcluster.conf
      if [ -f "$conf" ]; then
        cp -p "$conf" "$conf.volery-saved"
        restore=$conf.volery-saved
        say 'create_main_cluster = false' >> "$conf"
      fi
      ;;
  esac
  # shellcheck disable=SC2086  # one word per package
  install_with "Setting up " "$@" $names
}

install_el() {
  # libvirt-devel and a few others are in the builder's repository, which is off by default.
  builder=$(dnf -q repolist --all | awk '/^(crb|codeready|[a-z0-9]*_codeready_builder)/ { print $1; exit }')
  # Not strict: names differ a little between releases; what is left out is told below.
  # shellcheck disable=SC2086  # one word per package
  install_with "  Installing " dnf -y --setopt=strict=0 ${builder:+--enablerepo="$builder"} install $names
}

if [ "$purpose" != venv ]; then
  if [ -z "$family" ]; then
    fail "${PRETTY_NAME:-this system} isn't supported. Volery sets itself up on Debian 12 and 13, Ubuntu 24.04
and Enterprise Linux 9 (Oracle, Rocky, Alma, Red Hat). On another system install what these do:
$(packages | awk '$1 == "debian" && $2 == "run" { printf "%s ", $3 }')
then make .venv with: deploy/bootstrap.sh venv"
  fi
  installed=$("installed_$family" || :)
  wanted=$(missing)
  if [ -n "$wanted" ]; then
    names=$(say "$wanted" | awk '{ printf "%s ", $1 }')
    if [ "$(id -u)" != 0 ]; then
      fail "these packages are missing and only root can install them: $names
Run the same command as root, for example: sudo make ${VOLERY_TARGET:-up}"
    fi
    say "Installing what is missing:"
    say "$wanted" | while read -r name reason; do printf '  %-27s %s\n' "$name" "$reason"; done
    "install_$family"
    installed=$("installed_$family" || :)
    left=$(missing | awk '{ printf "%s ", $1 }')
    [ -z "$left" ] || say "Not in this system's repositories, so what they are for will not work: $left"
  fi
fi

# --- the virtual environment ----------------------------------------------------------------

# The newest of those that the distribution has and that is new enough. Its own before others on the path: it is what
# other machines of this system run, and built with all optimizations, which tools such as pyenv leave out (a fifth).
find_python() {
  for name in "${VOLERY_SETUP_PYTHON:-}" /usr/bin/python3.13 /usr/bin/python3.12 /usr/bin/python3.11 /usr/bin/python3 \
    python3.13 python3.12 python3.11 python3; do
    [ -n "$name" ] || continue
    command -v "$name" > /dev/null 2>&1 || continue
    "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    command -v "$name"
    return
  done
}

stamp=$venv/.volery-$(basename "$lock")
# Where the checkout lies is part of it: a moved environment's programs start the old interpreter.
want="$(sha256sum < "$lock" | cut -d ' ' -f 1) $root"

satisfied() {
  [ -x "$venv/bin/python" ] && [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]
}

if ! satisfied "$stamp" "$want"; then
  # What tests need contains what running needs, in the same versions.
  dev=$root/requirements-dev.lock
  dev_stamp=$venv/.volery-$(basename "$dev")
  dev_want="$(sha256sum < "$dev" | cut -d ' ' -f 1) $root"
  if [ "$purpose" != run ] || ! satisfied "$dev_stamp" "$dev_want"; then
    if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
      python=$(find_python)
      [ -n "$python" ] || fail "no Python 3.11 or newer with venv was found. Install python3.11 (or newer) and python3-venv."
      say "Making .venv with $("$python" --version)"
      "$python" -m venv --clear "$venv"
    fi
    say "Installing the $(grep -c '==' "$lock") Python packages of $(basename "$lock")"
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input -q \
      --require-hashes -r "$lock" > "$log" 2>&1; then
      tail -n 25 "$log" >&2
      fail "the Python packages can't be installed; pip's last lines are above."
    fi
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    say "$root" > "$site/volery.pth"
    say "$want" > "$stamp"
  fi
fi
