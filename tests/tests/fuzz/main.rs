//! Any bytes for a VIP, through the real program and through a parser that was written from the
//! documents: both must come to the same end.
//!
//! Guided: a frame that led the second parser a step not seen before, or the program to another
//! end there, is kept, and later ones are made from those that were kept. The two ask the same
//! questions of a frame, so the steps of the one stand for the branches of the other.
//! `docs/testing.md` says how to run it for longer.

mod judge;
mod mutate;

use judge::{PORT, Sentence, judge};
use lb_common::service::on_no_backend;
use mutate::{Random, mutate};
use sluice_tests::{
    harness::{Balancer, Outcome, TCP, UDP, Verdict, service},
    oracle,
    packet::{
        BALANCER, CLIENT, DESTINATION_OPTIONS, Family, HOP_BY_HOP, STRANGER, VIP, arp_request,
        other, ping, tcp, udp,
    },
};
use std::{
    collections::{BTreeMap, HashSet},
    env,
};

/// Frames that are run unless `SLUICE_FUZZ_RUNS` says otherwise: about twenty seconds.
const RUNS: usize = 200_000;

fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|e| panic!("{name}={text} is not a number: {e}"))
    })
}

fn balancer() -> Balancer {
    let services = Family::BOTH.into_iter().flat_map(|family| {
        [TCP, UDP]
            .map(|protocol| service(family, protocol, VIP, PORT).on_no_backend(on_no_backend::DROP))
    });
    Balancer::new(services.collect())
}

/// Where it begins: ordinary packets, a few of each kind.
fn seeds() -> Vec<Vec<u8>> {
    let mut frames = vec![arp_request(CLIENT, VIP.v4)];
    for family in Family::BOTH {
        let segment = tcp(family).from(CLIENT, 40000).to(VIP, PORT);
        let datagram = udp(family).from(CLIENT, 40000).to(VIP, PORT);
        let packets = [
            segment.clone().syn(),
            segment.clone().ack().payload(*b"in the middle"),
            segment.clone().rst(),
            segment.clone().syn().vlan(0x8100, 5),
            segment.clone().fragment(0, true),
            segment.clone().fragment(9, false),
            segment.clone().to(STRANGER, PORT),
            segment.clone().to(BALANCER, 22),
            datagram.clone().payload([7; 33]),
            datagram.fragment(0, true),
            ping(family, 1, 1).from(CLIENT, 0).to(VIP, 0),
            other(family, 47).from(CLIENT, 0).to(VIP, 0),
            match family {
                Family::V4 => segment.syn().options(&[1; 12]),
                Family::V6 => segment
                    .syn()
                    .extension(HOP_BY_HOP, 8)
                    .extension(DESTINATION_OPTIONS, 16),
            },
        ];
        frames.extend(packets.iter().map(|packet| packet.build()));
    }
    frames
}

/// What is wrong with what became of `frame`.
fn complaint(frame: &[u8], sentence: &Sentence, real: &Outcome) -> Option<String> {
    let drops: Vec<(&str, u64)> = real.counts.drops.iter().map(|(r, n)| (*r, *n)).collect();
    let forwarded = real
        .counts
        .services
        .values()
        .any(|c| c.packets_in + c.packets_out + c.connections > 0);
    let right = match sentence {
        Sentence::Pass => real.verdict == Verdict::Pass && drops.is_empty() && real.frame == frame,
        Sentence::Drop(reason) => real.verdict == Verdict::Drop && drops == [(*reason, 1)],
        Sentence::Reset(answer) => {
            let difference = oracle::difference(&answer.build(), &real.frame);
            if real.verdict == Verdict::Tx && !difference.is_empty() {
                return Some(format!("another RST:\n{difference}"));
            }
            real.verdict == Verdict::Tx && drops == [("no_flow", 1)]
        }
        Sentence::Open => match real.verdict {
            Verdict::Pass => drops.is_empty() && real.frame == frame,
            Verdict::Drop => drops.len() == 1 && drops[0].1 == 1,
            verdict => verdict == Verdict::Tx && drops.is_empty(),
        },
    };
    (!right || forwarded).then(|| {
        format!(
            "{:?}, counted {:?}, and should have been {sentence:?}",
            real.verdict, real.counts
        )
    })
}

fn hex(frame: &[u8]) -> String {
    frame.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The shortest frame that is still complained of, made from `frame` by leaving bytes out and
/// setting them to zero.
fn shrink(balancer: &mut Balancer, frame: &[u8]) -> (Vec<u8>, String) {
    let mut wrong = |frame: &[u8]| {
        let real = balancer.run(frame);
        complaint(frame, &judge(frame).sentence, &real)
    };
    let mut best = frame.to_vec();
    let mut words = wrong(&best).unwrap_or_else(|| "it is right the second time".to_owned());
    for at in (0..frame.len()).rev() {
        let (mut shorter, mut zeroed) = (best.clone(), best.clone());
        if at < best.len() {
            shorter.remove(at);
            zeroed[at] = 0;
        }
        for candidate in [shorter, zeroed] {
            if candidate.len() >= 14
                && candidate != best
                && let Some(found) = wrong(&candidate)
            {
                (best, words) = (candidate, found);
                break;
            }
        }
    }
    (best, words)
}

#[test]
fn any_bytes_meet_the_end_that_the_documents_say() {
    let runs = number("SLUICE_FUZZ_RUNS", RUNS as u64) as usize;
    let seed = number("SLUICE_FUZZ_SEED", 1);
    let mut random = Random::new(seed);
    let mut balancer = balancer();
    let mut corpus: Vec<Vec<u8>> = Vec::new();
    let mut seen = HashSet::new();
    let mut ends: BTreeMap<String, usize> = BTreeMap::new();
    let seeds = seeds();
    for run in 0..runs {
        let frame = match seeds.get(run) {
            Some(frame) => frame.clone(),
            None => {
                // Half of them from the newest, which lead where nobody has been long.
                let newest = corpus.len().saturating_sub(64) * random.below(2);
                let from = newest + random.below(corpus.len() - newest);
                let other = random.below(corpus.len());
                mutate(&mut random, &corpus[from], &corpus[other])
            }
        };
        let judged = judge(&frame);
        let real = balancer.run(&frame);
        if complaint(&frame, &judged.sentence, &real).is_some() {
            let (frame, words) = shrink(&mut balancer, &frame);
            panic!(
                "seed {seed}, frame {run}, made smaller: {words}\n{}",
                hex(&frame)
            );
        }
        let end = match &judged.sentence {
            Sentence::Drop(reason) => (*reason).to_owned(),
            Sentence::Reset(_) => "reset".to_owned(),
            Sentence::Pass => "pass".to_owned(),
            Sentence::Open => format!("open, {:?}", real.verdict),
        };
        // Steps, each an answer and the one before it: whole ways would be too many.
        let mut before = 0;
        let mut new = false;
        for step in &judged.way {
            new |= seen.insert((before, *step, String::new()));
            before = *step;
        }
        new |= seen.insert((before, 0, end.clone()));
        *ends.entry(end).or_default() += 1;
        if new {
            corpus.push(frame);
        }
    }
    println!(
        "{} frames kept, {} steps seen, ends: {ends:#?}",
        corpus.len(),
        seen.len()
    );
    // Agreement counts only for what was reached.
    if runs >= RUNS {
        for end in [
            "pass",
            "reset",
            "malformed",
            "fragment",
            "no_backend",
            "no_flow",
            "martian",
            "open, Tx",
            "open, Pass",
            "open, Drop",
        ] {
            assert!(ends.contains_key(end), "no frame was {end}: {ends:?}");
        }
        assert!(seen.len() > 250, "{} steps only", seen.len());
    }
}

/// The judge must be able to find fault.
#[test]
fn a_wrong_end_is_noticed() {
    let mut balancer = balancer();
    let frame = tcp(Family::V4)
        .from(CLIENT, 40000)
        .to(VIP, PORT)
        .syn()
        .build();
    let real = balancer.run(&frame);
    let sentence = judge(&frame).sentence;
    assert_eq!(complaint(&frame, &sentence, &real), None);
    assert!(complaint(&frame, &Sentence::Pass, &real).is_some());
    assert!(complaint(&frame, &Sentence::Drop("malformed"), &real).is_some());
    let passed = Outcome {
        verdict: Verdict::Pass,
        ..real
    };
    assert!(complaint(&frame, &sentence, &passed).is_some());
}
