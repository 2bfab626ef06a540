#!/bin/sh
# deploy.sh APP IMAGE [MESSAGE]
for attempt in 1 2 3; do
    code=0
    demae deploy "$1" "$2" --timeout 15m -m "${3:-}" || code=$?
    [ "$code" = 75 ] || break
    sleep 20
done
case $code in
    5) echo "a later change of $1 has taken over"; exit 0 ;;
    6) echo "$1 is proven on its canaries: demae promote $1"; exit 0 ;;
    *) exit "$code" ;;
esac
