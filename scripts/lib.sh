# What scripts/start and scripts/test share: from a bare Debian or Ubuntu to a working .venv and RabbitMQ.
# Sourced by bash, never run. Every way out that fails says one sentence: what is missing and how to get it.

name="scripts/$(basename "$0")"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
policy="/usr/sbin/policy-rc.d"
boot_links="/etc/rc[2-5].d/S[0-9][0-9]rabbitmq-server"
policy_mark="written by imrelay"
# What has to be undone when this run ends before it is done with it.
new_venv="" new_policy="" log=""
# The services that this machine started at its boot before anything was installed here.
booted=""

say() { printf '%s: %s\n' "$name" "$*" >&2; }
die() { say "$@"; exit 1; }

clean_up() {
    [ -z "$new_venv" ] || rm -rf -- "$venv" "$root/imrelay.egg-info"
    [ -z "$new_policy" ] || as_root rm -f "$policy"
    [ -z "$log" ] || rm -f -- "$log"
    new_venv="" new_policy="" log=""
}
trap clean_up EXIT
trap 'clean_up; trap - INT; kill -INT $$' INT
trap 'clean_up; trap - TERM; kill -TERM $$' TERM
trap 'clean_up; trap - HUP; kill -HUP $$' HUP

# set_up start|test [arguments of the relay]: install what is missing; quick when nothing is.
set_up() {
    local purpose="$1" python
    shift
    cd "$root" || die "the folder $root cannot be entered: make it readable for this user"
    # Two runs at once would build the same .venv: the second waits. Nothing is left behind by this lock.
    if command -v flock >/dev/null; then
        exec 9<"$root"
        flock -n 9 || { say "another run is setting up: waiting for it"; flock 9; }
    fi
    find_python
    install_missing "$purpose" "$@"
    make_venv "$purpose"
    exec 9<&-
}

# Sets `python`: the one of .venv if that can be used, else the first on PATH that is new enough.
find_python() {
    local candidate found=""
    for candidate in "$venv/bin/python" python3 python3.{10..20} python; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            python="$(command -v "$candidate")"
            return
        fi
        [ "$candidate" = "$venv/bin/python" ] || found="${found:-$(command -v "$candidate")}"
    done
    [ -n "$found" ] || die "Python 3.10 or newer is needed and there is none: run 'apt-get install python3' as root," \
        "then $name again"
    die "Python 3.10 or newer is needed and $found is" \
        "$("$found" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null || echo "none"):" \
        "install a newer one (Debian 12 and Ubuntu 22.04 have it) and put it on PATH as python3"
}

is_venv_usable() { "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; }

has_rabbitmq() {
    local place on_path
    for place in /usr/lib/rabbitmq/bin /usr/lib*/rabbitmq/lib/rabbitmq_server-*/sbin /opt/rabbitmq*/sbin \
        /usr/local/opt/rabbitmq/sbin /opt/homebrew/opt/rabbitmq/sbin /usr/local/lib/rabbitmq/bin /usr/local/sbin; do
        [ ! -x "$place/rabbitmq-server" ] || return 0
    done
    on_path="$(command -v rabbitmq-server)" || return 1
    [ "$(basename "$(readlink -f "$on_path")")" != rabbitmq-script-wrapper ]
}

# Whether the relay is to run a RabbitMQ of its own: true unless an AMQP URL is given anywhere.
is_private() {
    case " ${IMRELAY_BROKER_URL:-} $*" in *amqp://* | *amqps://*) return 1 ;; esac
    ! grep -Eqs '^[[:space:]]*url[[:space:]]*[=:][[:space:]]*amqps?://' "$root/config.ini"
}

has_browser() {
    local browser
    for browser in chromium chromium-browser google-chrome google-chrome-stable; do
        ! command -v "$browser" >/dev/null || return 0
    done
    return 1
}

# Install by the distribution's packages what is not there.
install_missing() {
    local purpose="$1" version
    local -a packages=() what=()
    shift
    if ! is_venv_usable && ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        version="$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
        case "$(readlink -f "$python")" in
            /usr/bin/*) packages+=("$version") what+=("Python's venv module") ;;
            *) die "$python has no venv and ensurepip modules: reinstall that Python with them, then run $name again" ;;
        esac
    fi
    if ! has_rabbitmq && { [ "$purpose" = test ] || is_private "$@"; }; then
        packages+=(rabbitmq-server) what+=("RabbitMQ")
    fi
    [ ${#packages[@]} -eq 0 ] || apt_install "$(join " and " "${what[@]}")" "${packages[@]}" || exit 1
    if [ "$purpose" = test ] && ! has_browser; then
        apt_install "a browser for the test of the page" chromium ||
            say "going on without a browser: the test of the page will be skipped"
    fi
}

join() {
    local separator="$1" text="$2"
    shift 2
    for word in "$@"; do text+="$separator$word"; done
    printf '%s' "$text"
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@" 9<&-; else sudo -n "$@" 9<&-; fi
}

# apt_install <what a person calls it> <package>…: says one sentence and returns 1 where it cannot.
apt_install() {
    local what="$1" by_hand status
    shift
    by_hand="run 'apt-get update && apt-get install $*' as root, then $name again"
    if ! command -v apt-get >/dev/null; then
        say "needs $what, and this system has no apt-get: install it by other means (Debian: $*), then run $name again"
        return 1
    fi
    if [ "$(id -u)" -ne 0 ] && ! { command -v sudo && sudo -n true; } >/dev/null 2>&1; then
        say "needs $what, which this user may not install: $by_hand"
        return 1
    fi
    say "installing $what ($*)"
    log="$(mktemp)"
    hold_services
    booted="$(booted_services)"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=120 update >"$log" 2>&1 </dev/null
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qy -o DPkg::Lock::Timeout=120 \
        --no-install-recommends install "$@" >>"$log" 2>&1 </dev/null
    status=$?
    release_services "$status" "$@"
    [ $status -eq 0 ] || say "needs $what, which apt-get could not install ($(errors 'E: ' | head -n 1)):" \
        "see to the network and the package sources, $by_hand"
    rm -f -- "$log"
    log=""
    return $status
}

# The lines of the log that begin with $1, without that.
errors() { sed -n "s/^[[:space:]]*$1//p" "$log" | cut -c -300 | grep -a . || echo "it gave no reason"; }

# Keep apt from starting a RabbitMQ on the standard port: imrelay runs its own. A policy that is there stays.
hold_services() {
    # One of an earlier run that was killed has no effect (see its last line) and is in the way.
    ! grep -qs "$policy_mark" "$policy" || as_root rm -f "$policy"
    [ ! -e "$policy" ] || return 0
    new_policy=yes
    as_root tee "$policy" >/dev/null <<END
#!/bin/sh
# $policy_mark while it installs RabbitMQ: starts no service of it as long as process $$ lives
case " \$* " in *rabbitmq-server*|*epmd*) ! kill -0 $$ 2>/dev/null || exit 101 ;; esac
exit 0
END
    as_root chmod 755 "$policy"
}

# Print which services of RabbitMQ and its port mapper the machine starts at its boot: systemd's, and init's.
booted_services() {
    local unit
    for unit in rabbitmq-server.service epmd.service epmd.socket; do
        ! systemctl --quiet is-enabled "$unit" >/dev/null 2>&1 || printf '%s\n' "$unit"
    done
    ! compgen -G "$boot_links" >/dev/null || echo rabbitmq-server
}

# … nor at the next boot, where our installation has enabled it: what was enabled before belongs to somebody else.
release_services() {
    local status="$1" service
    shift
    [ -z "$new_policy" ] || as_root rm -f "$policy"
    new_policy=""
    case " $* " in *" rabbitmq-server "*) ;; *) return ;; esac
    [ "$status" -eq 0 ] || return
    for service in $(booted_services); do
        ! grep -Fqx -- "$service" <<<"$booted" || continue
        case "$service" in
            *.*) as_root systemctl --quiet disable "$service" >/dev/null 2>&1 ;;
            *) as_root update-rc.d "$service" disable >/dev/null 2>&1 ;;
        esac
    done
}

# What .venv depends on: the package's description, the place of the checkout, the Python.
venv_key() { { cat "$root/setup.cfg" "$root/pyproject.toml" && printf '%s\n' "$root" && "$python" -VV; } | sha256sum; }

# Make .venv with the package in it; does nothing when that was done for these very files and this Python.
make_venv() {
    local purpose="$1" what=. key stamp mark
    [ "$purpose" = start ] || what=".[$purpose]"
    key="$(venv_key)"
    stamp="$venv/.imrelay-$purpose"
    for mark in "$stamp" "$venv/.imrelay-test"; do
        if [ "$(cat "$mark" 2>/dev/null)" = "$key" ]; then return; fi
    done
    if ! is_venv_usable; then
        [ -w "$root" ] || die "$root belongs to another user: run $name as that one, or in a clone of your own"
        if [ "$python" = "$venv/bin/python" ]; then python="$(readlink -f "$python")"; fi
        say "making $venv"
        rm -rf -- "$venv"
        new_venv=yes
        log="$(mktemp)"
        "$python" -m venv "$venv" >"$log" 2>&1 ||
            die "$python cannot make a virtual environment ($(tail -n 1 "$log" | cut -c -300)):" \
                "repair that Python's venv module, then run $name again"
        rm -f -- "$log"
    fi
    say "installing imrelay and the packages it needs into $venv"
    log="$(mktemp)"
    "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check -e "$what" >"$log" 2>&1 </dev/null ||
        die "pip could not install what imrelay needs ($(errors 'ERROR: ' | tail -n 1)): see to the network, or name a" \
            "package index that this machine reaches by PIP_INDEX_URL, then run $name again"
    rm -f -- "$log"
    log=""
    printf '%s\n' "$key" >"$stamp"
    new_venv=""
}
