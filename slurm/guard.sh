# Sourced by the job scripts in this folder. A job receives SIGTERM two minutes before its time limit or when it is
# preempted. The script forwards the signal, waits until the work has been saved, and requeues the job.

child=
signals=0
forward() {
  signals=$((signals + 1))
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap forward TERM

# Run a command that receives our SIGTERM, and return its status. A signal interrupts `wait`, which is then repeated.
guarded() {
  local status before
  "$@" &
  child=$!
  [ "$signals" -eq 0 ] || kill -TERM "$child" 2>/dev/null
  while before=$signals; wait "$child"; status=$?; [ "$before" -ne "$signals" ]; do :; done
  child=
  return "$status"
}

# Test whether a status means "stopped from outside", not "failed".
was_stopped() {
  [ "$1" -eq 143 ] || { [ "$1" -ne 0 ] && [ "$signals" -gt 0 ]; }
}
