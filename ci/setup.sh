# shellcheck shell=bash
# Sourced by the scripts here, not run: makes .venv and what kvmnest needs from apt, once.
#
# setup EXTRAS: EXTRAS is "" or "dev". Sets python to the environment's interpreter. What was
# installed is remembered in .venv under a hash of everything it was made from, so that a second
# start only compares. Any failure is one line on stderr and exit 3.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 3
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore DEBIAN_FRONTEND=noninteractive
stamp=.venv/kvmnest-stamp

die() {
    echo "${0##*/}: $*" >&2
    exit 3
}

# Debian's own Python first: it is optimised, and what it loads is where the lab expects it.
find_python() {
    local candidate
    for candidate in ${KVMNEST_PYTHON:+"$KVMNEST_PYTHON"} /usr/bin/python3 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed: apt-get install python3, or set KVMNEST_PYTHON"
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    else
        sudo "$@"
    fi
}

need_root() {
    [ "$(id -u)" -eq 0 ] || command -v sudo >/dev/null ||
        die "root or sudo is needed once, for apt-get $*"
}

# run_quietly WHAT COMMAND...: no output unless it fails, then its last line as the reason.
run_quietly() {
    local what=$1 log
    shift
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1 </dev/null; then
        local reason
        reason=$(grep -aE '^(E:|ERROR:|error:)' "$log" | tail -n 1)
        [ -n "$reason" ] || reason=$(tail -n 1 "$log")
        rm -f "$log"
        die "$what failed: $reason"
    fi
    rm -f "$log"
}

# missing_packages NAME...: those of the Debian packages that are not installed.
missing_packages() {
    local name
    local -A installed=()
    while read -r name; do
        installed[$name]=1
    done < <(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "$@" 2>/dev/null |
        sed -n 's/^installed //p')
    for name; do
        [ -n "${installed[$name]:-}" ] || echo "$name"
    done
}

apt_packages() {
    local missing
    command -v dpkg-query >/dev/null || die "Debian or a relative of it is needed (no dpkg here)"
    mapfile -t missing < <(missing_packages "$@")
    # The lab takes its kernels from apt, so the lists have to be there too.
    if ! compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null; then
        need_root update
        echo "${0##*/}: reading apt's package lists"
        run_quietly "apt-get update" as_root apt-get -q update
    fi
    [ ${#missing[@]} -gt 0 ] || return 0
    need_root install "${missing[@]}"
    echo "${0##*/}: installing ${missing[*]}"
    apt_install "${missing[@]}"
}

# apt_install NAME...: dies with apt's reason.
apt_install() {
    as_root apt-get -qq install -y --no-install-recommends "$@" >/dev/null 2>&1 </dev/null &&
        return
    # The lists may be older than the mirror's files, or than packages that are installed.
    run_quietly "apt-get update" as_root apt-get -q update
    run_quietly "apt-get install $*" as_root apt-get -q install -y --no-install-recommends "$@"
}

# optional_packages NAME...: for tests that are skipped where these cannot be installed.
optional_packages() {
    local missing
    mapfile -t missing < <(missing_packages "$@")
    [ ${#missing[@]} -gt 0 ] || return 0
    echo "${0##*/}: installing ${missing[*]}, if that is possible"
    (apt_install "${missing[@]}") ||
        echo "${0##*/}: what needs ${missing[*]} is left out"
}

setup() {
    local extras=$1 base key
    local packages=(binutils bochs bochs-term bochsbios gcc linux-libc-dev vgabios)
    base=$(find_python) || exit
    [ "$base" != /usr/bin/python3 ] || packages+=(python3-venv)
    [ "$extras" != dev ] || packages+=(qemu-system-x86 shellcheck)
    apt_packages "${packages[@]}"
    [ "$extras" != dev ] || optional_packages vagrant vagrant-libvirt
    [ "$extras" != dev ] || optional_packages grub2-common

    python=.venv/bin/python
    key=$({
        "$base" -c 'import sys; print(sys.version)'
        pwd
        cat pyproject.toml kvmnest/kvm/cdef.py kvmnest/l1/build.py kvmnest/lab/build.py
        # Files only: building leaves a __pycache__ beside them.
        find payloads -maxdepth 1 -type f -print0 | LC_ALL=C sort -z | xargs -0 cat
    } | sha256sum | cut -d ' ' -f 1)
    if [ -x "$python" ] && [ -f "$stamp" ]; then
        local have
        have=$(<"$stamp")
        # An environment with the extras serves those who need none.
        [ "$have" != "$key dev" ] && [ "$have" != "$key $extras" ] || return 0
    fi
    if [ ! -x "$python" ] || ! "$python" -c '' 2>/dev/null; then
        echo "${0##*/}: making .venv with $("$base" --version)"
        rm -rf .venv
        run_quietly "making .venv" "$base" -m venv .venv
    fi
    echo "${0##*/}: installing kvmnest into .venv"
    rm -f "$stamp"
    run_quietly "pip install" "$python" -m pip install -q -e ".[${extras:-disassembly}]"
    echo "$key $extras" >"$stamp"
}

# build_emulator ARGUMENTS...: the lab's own Bochs, once, unless these arguments of `kvmnest run` or
# this machine's /dev/kvm make it useless. Where it cannot be built the lab uses Debian's.
build_emulator() {
    local argument reason status=0
    for argument; do
        case $argument in
        --bochs | --bochs=* | --boot | --boot=* | --target=kvm | kvm) return 0 ;;
        esac
    done
    ! "$python" -m kvmnest lab build --check || return 0
    optional_packages g++ make xz-utils
    echo "${0##*/}: building the lab's emulator, once: about two minutes of CPU time"
    { reason=$("$python" -m kvmnest lab build 2>&1 >&3); } 3>&1 || status=$?
    [ "$status" -lt 128 ] || exit "$status"
    [ "$status" -eq 0 ] ||
        echo "${0##*/}: the lab uses Debian's older Bochs: it is a third as fast, and cases for" \
            "newer CPUs are skipped (${reason#kvmnest: })"
}
