# What the scripts of the bench share; sourced by bash: run.sh <module> [arguments]. Becomes that module's process.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
module="$1"
shift
if [ ! -x "$root/.venv/bin/python" ]; then
    echo "scripts/$(basename "$0"): there is no virtual environment in .venv: run scripts/start or scripts/test once" >&2
    exit 1
fi
export PYTHONPATH="$root/scripts${PYTHONPATH:+:$PYTHONPATH}"
exec "$root/.venv/bin/python" -m "$module" "$@"
