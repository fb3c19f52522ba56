//! Sequences made from sequences that led somewhere new, through the program and the model in step.
//!
//! Random sequences rarely go deep: the tenth packet of a connection that was reset, replaced and
//! begun anew comes by chance once in ages. Here a sequence that brought an event after another
//! which ended as nothing before it did is kept, and later ones are made from those that were kept.

use super::{Event, Reached, Setup, check, events, follow, setup};
use proptest::{
    strategy::{Strategy, ValueTree as _},
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use std::{
    cell::RefCell,
    collections::{BTreeMap, HashSet},
    env,
};

/// Sequences that are run unless `SLUICE_FUZZ_SEQUENCES` says otherwise: about twenty seconds.
const RUNS: usize = 500;
/// Longest sequence.
const MAX: usize = 200;

fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|e| panic!("{name}={text} is not a number: {e}"))
    })
}

/// What chance gives.
struct Chance(TestRunner);

impl Chance {
    fn new(seed: u64) -> Self {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        Self(TestRunner::new_with_rng(Config::default(), rng))
    }

    fn give<S: Strategy>(&mut self, strategy: S) -> S::Value {
        let tree = strategy.new_tree(&mut self.0);
        tree.expect("nothing is filtered").current()
    }

    fn below(&mut self, end: usize) -> usize {
        self.give(0..end.max(1))
    }

    fn some_events(&mut self) -> Vec<Event> {
        let most = self.give(1usize..24);
        self.give(proptest::collection::vec(events(), 1..=most))
            .concat()
    }
}

type Sequence = (Setup, Vec<Event>);

/// Another sequence, made from one with a piece of another.
fn mutate(chance: &mut Chance, from: &Sequence, other: &Sequence) -> Sequence {
    let (mut setup_of_it, mut events) = from.clone();
    for _ in 0..=chance.below(3) {
        let at = chance.below(events.len() + 1);
        let end = (at + chance.below(12)).min(events.len());
        match chance.below(8) {
            0..3 => events.extend(chance.some_events()),
            3 => {
                let new = chance.some_events();
                events.splice(at..at, new);
            }
            4 => {
                let new = chance.some_events();
                events.splice(at..end, new);
            }
            5 => {
                let piece = events[at..end].to_vec();
                events.splice(at..at, piece);
            }
            6 => {
                events.truncate(at);
                events.extend(other.1.iter().skip(at).cloned());
            }
            _ => {
                let n = chance.below(setup_of_it.services.len());
                setup_of_it.services[n] = chance.give(setup()).services[n];
            }
        }
        events.truncate(MAX);
    }
    (setup_of_it, events)
}

/// The sequence without what is not needed for the two to differ.
fn shrink((setup, events): &Sequence) -> Vec<Event> {
    let differ = |events: &[Event]| check(setup, events, &RefCell::new(Reached::new())).is_err();
    let mut best = events.clone();
    let mut piece = best.len() / 2;
    while piece > 0 {
        let mut at = 0;
        while at < best.len() {
            let mut shorter = best.clone();
            shorter.drain(at..(at + piece).min(best.len()));
            if differ(&shorter) {
                best = shorter;
            } else {
                at += piece;
            }
        }
        piece /= 2;
    }
    best
}

#[test]
fn sequences_that_lead_somewhere_new_agree_with_the_model() {
    let runs = number("SLUICE_FUZZ_SEQUENCES", RUNS as u64) as usize;
    let seed = number("SLUICE_FUZZ_SEED", 1);
    let mut chance = Chance::new(seed);
    let mut corpus: Vec<Sequence> = Vec::new();
    let mut seen = HashSet::new();
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for run in 0..runs {
        let sequence = if corpus.len() < 8 {
            (chance.give(setup()), chance.some_events())
        } else {
            let newest = corpus.len().saturating_sub(32) * chance.below(2);
            let from = newest + chance.below(corpus.len() - newest);
            let other = chance.below(corpus.len());
            mutate(&mut chance, &corpus[from], &corpus[other])
        };
        let (reached, mut trail) = (RefCell::new(Reached::new()), Vec::new());
        if let Err(error) = follow(&sequence.0, &sequence.1, &reached, &mut trail) {
            let events = shrink(&sequence);
            let again = check(&sequence.0, &events, &RefCell::new(Reached::new()));
            let error = again.err().unwrap_or(error);
            let lines: Vec<String> = events.iter().map(|event| format!("{event:?}")).collect();
            panic!(
                "seed {seed}, sequence {run}, made shorter: {error}\n{:?}\n{}",
                sequence.0,
                lines.join("\n")
            );
        }
        for word in &trail {
            let kind = word.split(' ').next().unwrap_or_default();
            *kinds.entry(kind.to_owned()).or_default() += 1;
        }
        // What became of an event, and of the one before it; and how flows stood at the end.
        let pairs = trail.windows(2).map(|pair| pair.join(", then "));
        let features: Vec<String> = pairs.chain(reached.into_inner().into_keys()).collect();
        let before = seen.len();
        seen.extend(features);
        if seen.len() > before {
            corpus.push(sequence);
        }
    }
    println!(
        "{} sequences kept, {} steps seen, {kinds:#?}",
        corpus.len(),
        seen.len()
    );
    // Agreement counts only for what was reached.
    if runs >= RUNS {
        for kind in [
            "client", "more", "reply", "stray", "ping", "error", "changed",
        ] {
            assert!(kinds.get(kind) > Some(&100), "too few: {kind} of {kinds:?}");
        }
        assert!(seen.len() > 1000, "{} steps only", seen.len());
    }
}
