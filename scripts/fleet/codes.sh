# shellcheck shell=bash
# Sourced by scripts/fleet.sh: every exit code of the command line, with what is printed beside it, by a program that has
# no terminal and on a terminal. What is printed is held to tests/golden/codes.txt; DEMAE_UPDATE=1 writes that file.

# What is the same in every run: the result, what is wrong, and what to do next.
outcomes() {
    sed -e 's/\x1b\[[0-9;]*[A-Za-z]//g' -e 's/\r//g' |
        grep -E '^(web [0-9a-z]|error|apps/|line |demae:|Next:|[-+] |stopped|not decided|host[0-9]+ +\| cannot)' |
        sed -E -e 's/^- image: .*/- image: BEFORE/' -e 's/\b[0-9a-f]{12}\b/RELEASE/g' -e 's/\b[0-9.]+ (ms|s|min)\b/N s/g' -e 's/revision [0-9]+/revision N/g'
}

# Runs a verb on a host, as a program or on a terminal, and notes what it answered.
answer() { # CODE ARGUMENTS...
    local expected=$1 code=0 line
    shift
    line=$(printf '%q ' demae "$@")
    echo "\$ ${line% }" >>"$work/codes.txt"
    spoken "$line" >"$work/answer" 2>&1 || code=$?
    outcomes <"$work/answer" >>"$work/codes.txt" || true
    echo "exit code $code" >>"$work/codes.txt"
    [ "$code" = "$expected" ] || fail "$line: exit code $code, not $expected: $(tail -n 5 "$work/answer")"
}
spoken() { # LINE
    case $way in
    program) on host2 sh -c "$1" </dev/null ;;
    terminal) on host2 script -qec "$1" /dev/null </dev/null ;;
    esac
}

put_canary_spec() {
    put_spec 2s
    put apps/web/spec "$(get apps/web/spec | sed 's/parallelism: 1,/parallelism: 1, canary: 1,/')"
}

# One way through all codes. The releases are its own, since one that failed is known.
all_codes() { # GOOD BAD NEXT LATER LAST
    local first
    put_spec 2s
    answer 0 deploy web "fleet/web:$1"
    version=$1
    answer 1 deploy web 'fleet/web: v1'
    answer 2 diff web
    answer 3 deploy web "fleet/web:$2"
    answer 0 rollback web
    answer 0 deploy web "fleet/web:$1"
    answer 0 pause web
    answer 4 deploy web "fleet/web:$3"
    answer 0 resume web
    answer 0 wait web
    version=$3
    # Another deploy comes while this one is under way.
    before=$(rollout release)
    spoken "demae deploy web fleet/web:$4" >"$work/superseded" 2>&1 &
    first=$!
    await 30 "the rollout of $4 is opened" another_rollout
    answer 0 deploy web "fleet/web:$1" --detach
    local code=0
    wait "$first" || code=$?
    { echo "\$ demae deploy web fleet/web:$4"; outcomes <"$work/superseded"; echo "exit code $code"; } >>"$work/codes.txt"
    [ "$code" = 5 ] || fail "a deploy that is superseded: exit code $code: $(tail -n 5 "$work/superseded")"
    answer 0 wait web
    answer 124 deploy web "fleet/web:$4" --timeout 1s
    answer 0 wait web
    line="demae deploy web fleet/web:$1"
    code=0
    spoken "timeout --foreground --preserve-status --signal INT 1 $line" >"$work/answer" 2>&1 || code=$?
    { echo "\$ $line    # Ctrl-C"; outcomes <"$work/answer"; echo "exit code $code"; } >>"$work/codes.txt"
    [ "$code" = 130 ] || fail "Ctrl-C: exit code $code: $(tail -n 5 "$work/answer")"
    answer 0 wait web
    put_canary_spec
    answer 6 deploy web "fleet/web:$5"
    answer 0 promote web
    put_spec 2s
    answer 0 wait web
    version=$5
    answer 64 deploy web
    answer 0 run web -- exit 0 0
    answer 7 exec web -- /app exit 7 0
    answer 125 exec nothing -- /app
    answer 126 exec web -- /etc/hostname
    answer 127 exec web -- /nowhere
    answer 75 status --fleet --endpoints 127.0.0.1:1 --dial-timeout 500ms
    at_rest "$version"
}

scenario_codes() {
    local way golden=tests/golden/codes.txt
    for way in program terminal; do
        : >"$work/codes.txt"
        case $way in
        program) all_codes v16 exits6 v17 v18 v19 ;;
        terminal) all_codes v20 exits7 v21 v22 v23 ;;
        esac
        # The versions differ, so that each release is new.
        sed -i -E -e 's/:(v16|v20)\b/:good/' -e 's/:exits[67]\b/:bad/' -e 's/:(v17|v21)\b/:next/' \
            -e 's/:(v18|v22)\b/:later/' -e 's/:(v19|v23)\b/:last/' "$work/codes.txt"
        if [ -n "${DEMAE_UPDATE:-}" ] && [ $way = program ]; then cp "$work/codes.txt" "$golden"; fi
        diff -u "$golden" "$work/codes.txt" >&2 || fail "the answers to a $way differ from $golden"
    done
    passed codes "$(grep -c '^exit code' "$golden") commands, as a program and on a terminal"
}
