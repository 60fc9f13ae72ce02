# Sourced by the job scripts here. A job is told to stop by SIGTERM, two minutes before its time is up or when another
# takes its place. The script hands that on, waits for the work to be put down in good order, and asks for another turn.

child=
signals=0
forward() {
  signals=$((signals + 1))
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap forward TERM

# Run a command that hears our SIGTERM, and return its status. A signal cuts `wait` short, so we wait until none came.
guarded() {
  local status heard
  "$@" &
  child=$!
  [ "$signals" -eq 0 ] || kill -TERM "$child" 2>/dev/null
  while heard=$signals; wait "$child"; status=$?; [ "$heard" -ne "$signals" ]; do :; done
  child=
  return "$status"
}

# Whether a status means "stopped from outside", not "failed".
was_stopped() {
  [ "$1" -eq 143 ] || { [ "$1" -ne 0 ] && [ "$signals" -gt 0 ]; }
}
