//! Choices by actor: who has the turns, and what each actor is told. A script can lose an operation of one
//! actor without changing what the others are told, which a tape cannot.
//!
//! ```text
//!  tape    2 0 0 1 5 0 3 ...        every answer in order, whoever was asked
//!  script  turns  cpu0*2 gpu0*1 ...           cpu0  5 ...           gpu0  3 ...
//! ```

use crate::sched::pick::{ACTORS_MAX, Candidates, Playback, What};
use crate::sched::shrink::cost;
use crate::sched::tape::Tape;

/// The choices of a world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Script {
    turns: Vec<Turn>,
    /// By actor; the last place is for what no actor was asked.
    told: Vec<Vec<u32>>,
}

/// An actor goes on for so many choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Turn {
    actor: usize,
    choices: u32,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            turns: Vec::new(),
            told: vec![Vec::new(); ACTORS_MAX + 1],
        }
    }
}

impl Script {
    /// The script in which turn `from` is part of turn `to`.
    fn merged(&self, from: usize, to: usize) -> Self {
        let mut script = self.clone();
        script.turns[to].choices += script.turns[from].choices;
        script.turns.remove(from);
        script
    }

    /// Takes note of one answer.
    fn note(&mut self, what: What, among: Candidates, answer: u32) {
        match what {
            What::Rare(_) | What::Data => self.told[among.first as usize].push(answer),
            What::Stay | What::Yield | What::Next => {
                let actor = among.actor(answer);
                match self.turns.last_mut() {
                    Some(last) if last.actor == actor => last.choices += 1,
                    _ => self.turns.push(Turn { actor, choices: 1 }),
                }
            }
        }
    }
}

/// Plays a tape or a script, and takes note of what was really chosen.
#[derive(Clone, Debug)]
pub struct Scripted {
    source: Source,
    played: Script,
}

#[derive(Clone, Debug)]
enum Source {
    Tape(Playback),
    Script(Reader),
}

impl Scripted {
    pub(super) fn tape(tape: Playback) -> Self {
        Self::of(Source::Tape(tape))
    }

    fn script(script: Script) -> Self {
        let read = vec![0; script.told.len()];
        Self::of(Source::Script(Reader {
            script,
            turn: 0,
            passed: 0,
            read,
        }))
    }

    fn of(source: Source) -> Self {
        Self {
            source,
            played: Script::default(),
        }
    }

    /// What was chosen.
    pub(super) fn played(self) -> Script {
        self.played
    }

    pub(super) fn pick(&mut self, n: u32, what: What, among: Candidates) -> u32 {
        let answer = match &mut self.source {
            Source::Tape(tape) => tape.pick(n),
            Source::Script(reader) => reader.pick(n, what, among),
        };
        self.played.note(what, among, answer);
        answer
    }
}

/// Where the playing of a script is.
#[derive(Clone, Debug)]
struct Reader {
    script: Script,
    turn: usize,
    /// Choices of the turn so far.
    passed: u32,
    /// What each actor was told so far.
    read: Vec<usize>,
}

impl Reader {
    fn pick(&mut self, n: u32, what: What, among: Candidates) -> u32 {
        match what {
            What::Rare(_) | What::Data => {
                let actor = among.first as usize;
                let told = self.script.told[actor].get(self.read[actor]);
                self.read[actor] += 1;
                told.copied().unwrap_or(0).min(n - 1)
            }
            What::Stay | What::Yield | What::Next => self.next_turn(among),
        }
    }

    /// Whose turn it is. Who cannot run loses the turn.
    fn next_turn(&mut self, among: Candidates) -> u32 {
        while let Some(turn) = self.script.turns.get(self.turn) {
            let place = among.place_of(turn.actor);
            if let Some(place) = place.filter(|_| self.passed < turn.choices) {
                self.passed += 1;
                return place;
            }
            self.turn += 1;
            self.passed = 0;
        }
        0
    }
}

/// Plays something; the tape and the script of the world, if it fails as it is to.
pub(super) type Play<'a> = &'a mut dyn FnMut(Scripted) -> Option<(Tape, Script)>;

/// Looks for a script of few choices that fails.
struct Shrinker<'a> {
    tape: Tape,
    script: Script,
    runs: u32,
    play: Play<'a>,
}

/// Shrinks a failing tape by actor, in at most `runs_max` runs. The result fails as well.
pub(super) fn shrink_by_actor(tape: &Tape, runs_max: u32, play: Play<'_>) -> Tape {
    let Some((tape, script)) = play(Scripted::tape(Playback::of(&tape.choices))) else {
        return tape.clone();
    };
    let mut shrinker = Shrinker {
        tape,
        script,
        runs: runs_max,
        play,
    };
    loop {
        let before = cost(&shrinker.tape.choices);
        shrinker.drop_actors();
        shrinker.drop_turns();
        shrinker.merge_turns();
        shrinker.tell_less();
        if cost(&shrinker.tape.choices) == before || shrinker.runs == 0 {
            return shrinker.tape;
        }
    }
}

impl Shrinker<'_> {
    /// Tries another script; whether it is now the best.
    fn attempt(&mut self, script: Script) -> bool {
        if self.runs == 0 || script == self.script {
            return false;
        }
        self.runs -= 1;
        let Some((mut tape, played)) = (self.play)(Scripted::script(script)) else {
            return false;
        };
        tape.trim();
        let simpler = cost(&tape.choices) < cost(&self.tape.choices);
        if simpler {
            (self.tape, self.script) = (tape, played);
        }
        simpler
    }

    /// An actor has no turns but when nobody else can run, and is told nothing.
    fn drop_actors(&mut self) {
        for actor in 0..=ACTORS_MAX {
            let mut script = self.script.clone();
            script.turns.retain(|turn| turn.actor != actor);
            script.told[actor].clear();
            self.attempt(script);
        }
    }

    /// Turns go, many at a time first.
    fn drop_turns(&mut self) {
        let len = |script: &Script| script.turns.len();
        self.by_blocks(len, |script, at, size| {
            let end = (at + size).min(script.turns.len());
            script.turns.drain(at..end);
        });
    }

    /// An actor has two turns in one: its next one at once, or this one only then.
    fn merge_turns(&mut self) {
        let mut at = 0;
        while at + 2 < self.script.turns.len() && self.runs > 0 {
            let turns = &self.script.turns;
            let actor = turns[at].actor;
            let next = (at + 1..turns.len()).find(|next| turns[*next].actor == actor);
            let merged = next.is_some_and(|next| {
                self.attempt(self.script.merged(next, at))
                    || self.attempt(self.script.merged(at, next))
            });
            if !merged {
                at += 1;
            }
        }
    }

    /// Actors are told 0, or what they were to be told later.
    fn tell_less(&mut self) {
        for actor in 0..=ACTORS_MAX {
            let len = |script: &Script| script.told[actor].len();
            self.by_blocks(len, |script, at, size| {
                let end = (at + size).min(script.told[actor].len());
                script.told[actor][at..end].fill(0);
            });
            self.by_blocks(len, |script, at, size| {
                let end = (at + size).min(script.told[actor].len());
                script.told[actor].drain(at..end);
            });
        }
    }

    /// Applies `change` to blocks of something that has a length, large ones first.
    fn by_blocks(
        &mut self,
        len: impl Fn(&Script) -> usize,
        change: impl Fn(&mut Script, usize, usize),
    ) {
        let mut size = len(&self.script);
        while size > 0 && self.runs > 0 {
            let mut at = 0;
            while at < len(&self.script) && self.runs > 0 {
                let mut script = self.script.clone();
                change(&mut script, at, size);
                // Where it worked, what comes next has moved here, or says nothing any more.
                if !self.attempt(script) {
                    at += size;
                }
            }
            size /= 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::sched::{Explorer, Kind, ModelEnv, Options, Picker, Sim, replay};

    /// Three actors are told numbers; one of them must not be told a certain one at a certain time.
    fn build(sim: &Sim) {
        for name in ["a", "b", "c"] {
            sim.spawn(name, move || (0..10).for_each(|n| ask(name, n)));
        }
    }

    fn ask(name: &str, n: u32) {
        let told = ModelEnv.choose(5);
        ModelEnv.point(Kind::Other);
        if (name, n, told) == ("b", 6, 3) {
            ModelEnv.fail("told too much");
        }
    }

    #[test]
    fn only_what_matters_is_left_of_each_actor() {
        let explorer = Explorer {
            options: Options::default(),
            picker: Picker::uniform,
            threads: 1,
            build,
        };
        let failure = explorer.run_seeds(0..1000, &|_worlds| {}).failure;
        let (_, trouble) = failure.expect("one world in five fails");
        assert!(trouble.tape.interesting() > 20, "actors take turns");
        let short = explorer.shrink_by_actor(&trouble.tape, trouble.failure.kind, 1000);
        assert_eq!(short.interesting(), 1);
        let again = replay(&explorer.options, &short, build).trouble;
        assert_eq!(again.expect("it fails").failure.text, trouble.failure.text);
    }
}
