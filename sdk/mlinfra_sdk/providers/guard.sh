# Lasts as long as the agent of the machine $1 does, and ends after $2 seconds if no agent ever
# comes. How the agent ended is its exit status (_EXITS in modal/provider.py). At Modal it is the
# entrypoint of a sandbox, and a command that keeps it awake; at Colab what ends the runtime; at
# SkyPilot a cluster's only job.
folder=$HOME/.cache/mlinfra/machines/$1
waited=0
until [ -s "$folder/pid" ]; do
  [ "$waited" -lt "$2" ] || exit 20
  waited=$((waited + 1))
  sleep 1
done
pid=$(cat "$folder/pid")
while [ -e "/proc/$pid" ] && ! grep -q '^State:.Z' "/proc/$pid/status" 2>/dev/null; do
  sleep 1
done
case $(cat "$folder/ended.json" 2>/dev/null) in
  *'"idle for'*) exit 21 ;;
  *'"its time of'*) exit 22 ;;
  *'"no client'*) exit 23 ;;
  *'"its budget'*) exit 25 ;;
esac
exit 24
