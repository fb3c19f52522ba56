//! How much work the programs are to the kernel's verifier. It gives up at a million instructions;
//! one that comes near is refused by the next kernel that counts a little differently.

use lb_common::abi::Settings;
use sluice::{config::Limits, dataplane::Dataplane};

/// About half as much again as it takes now.
const BUDGET: u32 = 700_000;

#[test]
fn the_balancer_stays_far_from_the_verifiers_limit() {
    let limits = Limits {
        flows: 1024,
        services: 16,
        backends: 16,
        slots: 1024,
        ..Limits::DEFAULT
    };
    let settings: Settings = bytemuck::Zeroable::zeroed();
    let dataplane = Dataplane::load_unpinned(&limits, settings).expect("the program loads");
    let programs = dataplane.programs().expect("the kernel tells");
    assert_eq!(programs.len(), 11, "all of them: {programs:?}");
    for program in programs {
        let (name, verified) = (&program.name, program.verified_instructions);
        println!("{name}: {verified} instructions verified");
        assert!(verified > 0, "{name}: the kernel does not tell how much");
        assert!(verified <= BUDGET, "{name}: {verified} of {BUDGET}");
    }
}
