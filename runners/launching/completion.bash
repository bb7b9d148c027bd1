# Completion of runners/*.py in bash: options, their groups' files, and folders.
# eval "$(python runners/sweep.py --shell-completion install=bash)"
_routebench() {
    local script=${COMP_WORDS[1]} word=${COMP_WORDS[COMP_CWORD]}
    script=${script/%runners\/plan.py/runners/sweep.py} # a plan takes the words of a sweep
    COMPREPLY=()
    [[ $COMP_CWORD -gt 1 && $script == *runners/*.py && -f $script ]] || return
    grep -q "@hydra.main" "$script" || return
    local known=$(COMP_LINE="python script ${COMP_WORDS[*]:2}" \
        "${COMP_WORDS[0]}" "$script" --shell-completion query=bash 2>/dev/null)
    COMPREPLY=($(compgen -W "$known" -- "$word"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=/}
complete -o nospace -o default -F _routebench python python3
