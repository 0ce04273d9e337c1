"""The plain-Python twin of mmu.machine and mmu.explore: one state at a time, dictionaries and sets, nothing clever.

It reads a Program's steps and runs them by itself, store buffers included, so that the tables, the keys, the quotient
and the litmus batch all have something to be equal to.
"""

from collections import deque

IDLE, DONE, OOPS = "", "done", "oops"


def start(program):
    """(values of all parts, for each actor (path, label, locals, buffer))."""
    values = tuple((part.name, part.start) for part in program.parts)
    return values, tuple(("", IDLE, (), ()) for _ in program.actors)


def moves(program, memory, state):
    """Every (actor, "step" or "flush", next state)."""
    values, actors = dict(state[0]), state[1]
    for vcpu, (path, label, known, buffer) in enumerate(actors):

        def arrive(actor, writes=(), vcpu=vcpu):
            after = {**values, **dict(writes)}
            others = (*actors[:vcpu], actor, *actors[vcpu + 1 :])
            return tuple((name, after[name]) for name in values), others

        if label == IDLE:
            steps = [(name, steps[0]) for name, steps in program.paths[vcpu].items()]
        elif label in (DONE, OOPS):
            steps = []
        else:
            steps = [(path, next(step for step in program.paths[vcpu][path] if step.label == label))]
        for name, step in steps:
            if step.kind in ("fence", "locked") and buffer:
                continue
            seen = dict(values)
            for entry in buffer:
                seen.update(entry)
            env = {"me": program.marks[vcpu], **dict(known)}
            if step.word is not None and step.kind in ("read", "locked"):
                env.update({part.name: seen[part.name] for part in step.word.parts})
            if step.guard and not step.guard.value(env):
                continue
            failed = any(env[part] != value.value(env) for part, value in step.old)
            writes = () if failed else tuple((part, int(value.value(env))) for part, value in step.new)
            env.update({local: env[part] for local, part in step.into})
            if failed and step.otherwise:
                there = step.otherwise
            elif step.condition and step.condition.value(env):
                there = step.target
            else:
                there = step.following
            kept = tuple(sorted((local, int(env[local])) for local in step.live(there) if local in env))
            pending = buffer
            if memory == "TSO" and step.kind == "store":
                pending, writes = (*buffer, writes), ()
            if there == DONE and program.forever:
                actor = ("", IDLE, (), pending)
            else:
                actor = ("" if there in (DONE, OOPS) else name, there, kept, pending)
            yield vcpu, "step", arrive(actor, writes)
        if buffer:
            yield vcpu, "flush", arrive((path, label, known, buffer[1:]), buffer[0])


def broken(program, state):
    """Whether a state breaks the invariant."""
    env = dict(state[0])
    for path in {path for paths in program.actors for path in paths}:
        env[f"done({path})"] = all(
            actor[1] == DONE for actor, paths in zip(state[1], program.actors, strict=True) if path in paths
        )
    return any(actor[1] == OOPS for actor in state[1]) or bool(program.oops.value(env))


def search(program, memory, bad=None):
    """(states, transitions, depth, depth of the nearest bad state or None, all states)."""
    bad = bad or (lambda state: broken(program, state))
    first = start(program)
    depth, queue, transitions, nearest = {first: 0}, deque([first]), 0, None
    while queue:
        state = queue.popleft()
        if nearest is None and bad(state):
            nearest = depth[state]
        for _, _, after in moves(program, memory, state):
            transitions += 1
            if after not in depth:
                depth[after] = depth[state] + 1
                queue.append(after)
    return len(depth), transitions, max(depth.values()), nearest, depth
