"""The rows of the scorecard: what may go wrong, and what is to happen then. Tests say which of them they are for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One thing that goes wrong, or that somebody tries."""

    id: str
    what: str
    expected: str

    @property
    def starred(self) -> bool:
        """Whether a release needs it."""
        return self.id in STARRED


STARRED = {
    *["R01", "R02", "R03", "R05", "R07", "R08", "R12", "R13", "R17", "R18", "R20", "R25", "R26", "R27", "R28", "R29", "R30", "R31", "R38", "R39", "R40", "R41", "R45", "R50", "R51", "R56", "R57", "R61", "S01", "S02", "S03", "S04", "S06", "S07", "S08", "S09", "S11", "S13", "S15", "S16"]
}  # fmt: skip

_RELIABILITY = """
R01 a rollout engine of several is killed | the run goes on; its prompts are sampled again; it is back after a proved sync
R02 the only rollout engine is killed | restarted within its budget; beyond it the run ends, its checkpoint whole
R03 EngineCore is killed, its actor lives | noticed within 15 s though the actor answers; then as R01
R04 vLLM's worker process is killed | as R03
R05 a rollout engine is killed during a sync | the learner is not blocked; never two versions serving
R06 a rollout engine fails at its start | fails or is tried again within 60 s, with the child's own words
R07 a learner rank is killed while it learns | its group restarts from the last checkpoint with the same prompts
R08 a learner rank is killed while it saves | the half-written checkpoint is not used
R09 a learner rank is killed during a sync | as R05
R10 reference, reward model or critic is killed | restarted without loss, the call repeated; the critic as a learner
R11 the process of a reward function is killed | asked again, then by its policy; a new process is there
R12 the driver is killed | its processes end within 10 s; the same command goes on
R13 a node is killed | as R01 or R07 on the others, or an end with need against have
R14 Ray's head is killed | the job ends within 60 s in plain words; the same command goes on
R15 metrics, UI or a Serve replica is killed | training goes on; the replica is replaced
R16 three random kills in a run, of several seeds | the laws hold; the reward curve is that of a clean run
R17 a rollout engine hangs in a call | its call ends at its deadline; it is killed and started anew
R18 a learner rank hangs in a collective | noticed within the stall limit with stacks; restarted as R07
R19 an engine is ten times slower | it gets less to do; it is not taken for dead
R20 a reward function never returns | killed at its deadline; by its policy; others go on; a new process is there
R21 a reward server is slow, says 500 or nonsense | asked again with pauses, a bounded number of times, then by its policy
R22 health is asked during a sync | answered, or not counted
R23 a queue stands still with nothing under way | noticed
R24 a probe that hangs | does not hold up the others
R25 SIGKILL at random moments of a save | the newest whole checkpoint loads
R26 SIGTERM during a save | it is completed or dropped; a second SIGTERM ends at once
R27 SIGTERM in any phase | a checkpoint is written; the same command ends as an undisturbed run
R28 the disk fills up | the last checkpoint stays whole; the error names path and bytes
R29 a file of a checkpoint is damaged, cut, missing or another's | refused by its digest; the one before is used, loudly
R30 resume where nothing is | told, with what there is
R31 retention with one checkpoint | the old one goes only when the new one is verified
R32 an output folder that cannot be written | refused at the start
R33 a save in the background fails | raised at the next one or at the end
R34 resume with other settings, tokenizer or data | refused with the list of differences
R35 a checkpoint of an older layout | read, or refused in plain words
R36 two runs in one folder | the second is refused
R37 renames without fsync | file, manifest and folder are synced first
R38 Parquet cut, empty or with flipped bits | an error with the file's name; never other rows
R39 malformed rows of at least 25 kinds, 1,000 of them | each named by file, line, field and reason; none gets through
R40 an empty prompt, blanks, empty behind the template | refused at load, by row
R41 an over-long prompt | left out at load and counted; at run time it harms no other
R42 a vocabulary that does not fit the model | refused at the start
R43 the same prompt twice | never merged; counted
R44 NUL, right-to-left marks, emoji, surrogates, NFC and NFD, a line of 1 MB | comes back as it was or is refused; no log moves the cursor
R45 a tokenizer without padding, end, template; a template without marks; one that adds a start token | its own padding; refused, naming the cure; the same tokens; one start token
R46 data smaller than a batch, just as large, one row, none | told, or trained as defined
R47 data changes under a run | told at resume
R48 preferences: equal, tied, one, nine, without ranks | the rule is stated and counted
R49 nothing sampled, an end at once, all cut, all rewards equal | no NaN; the advantage is 0; the step counts
R50 a reward of NaN, infinity, nothing, text, too large | refused with function and response; never in a mean; too many stop the run
R51 a gradient of NaN on one rank | all ranks skip, not a bit changes; more than 3 in a row stop the run with their prompts
R52 NaN in values or log-probabilities | named where it is from, before the optimizer
R53 NaN in the weights at a sync | refused; the engine keeps the last good version
R54 KL explodes, negative k3, ratio above 1000, entropy 0 | told, and stops the run if set so
R55 sampler and learner disagree | the run stops
R56 k steps and a resume | equal 2k steps
R57 resume on another number of ranks or engines | the same losses
R58 resume twice, of a finished run, with more steps | goes on; does nothing; by the stated rule
R59 a kill between checkpoint and metrics | no gap, no duplicate
R60 rollouts under way at a save | none lost, none trained on twice
R61 a port is in use; two runs at once; 20 starts and stops | another port, or told at once
R62 a stale cluster, RAY_ADDRESS to nowhere, leftovers | cleared away, or told
R63 a cluster too small | told at once, need against have
R64 200 steps | memory, store and open files stay flat
R65 10,000 steps | logs and notes stay small
R66 the clock jumps; no network; no hub | nothing depends on them
R67 a process out of memory | told as that
R68 Ctrl-C once, twice | ends cleanly; at once; no tracebacks
R69 a Serve replica is killed under load | replaced; waiting requests are bounded
R70 another model while serving | every answer is of one version, which it names
R71 a client leaves | its generation ends
R72 a malformed, over-long or 100 MB request | 4xx at once; the replica lives
"""

_SECURITY = """
S01 pickled weights | refused; not opened
S02 code that opens pickles, evaluates, shells out | none in the source but what is listed
S03 a changed checkpoint | refused before DeepSpeed opens it
S04 a model that brings code | not run; no option does so; workers do not reach for the hub
S05 packages with known holes | the bounds exclude them
S06 what listens | on loopback alone, but Ray's own daemons, unless asked
S07 Ray without a token | 401 in every start path; the token's file is 0600
S08 vLLM's development routes | not there
S09 the API key | asked on all routes; compared in constant time; in no log
S10 a web page of another origin; DNS rebinding | refused
S11 paths that leave their folder | refused
S12 uploads | there are none
S13 text that is markup | shown as text
S14 text with control characters in a log | escaped
S15 what a model wrote | is never run in our process
S16 programs that a model wrote | shut in: no network, no files, bounded, killed
S17 a program that only ends well | earns nothing
S18 reward servers that redirect | not followed
S19 secrets in config, records, logs | not there
S20 other users of the machine | read no key, token or temporary file
S21 requests without bound | tokens, bytes, queue and body are bounded
S22 a chat template that attacks | sandboxed
S23 who labelled what | kept in the rows
S24 supply chain | versions pinned; nothing is installed at run time
S25 a changed weight file | serve refuses it
"""


def _parsed(text: str) -> dict[str, Row]:
    rows = [Row(*line.split(" ", 1)[:1], *line.split(" ", 1)[1].split(" | ")) for line in text.strip().splitlines()]
    return {row.id: row for row in rows}


ROWS: dict[str, Row] = _parsed(_RELIABILITY) | _parsed(_SECURITY)
