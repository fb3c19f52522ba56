//! The program that runs in front of what is measured, and the clock.

use crate::frame::Family;
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::Map,
    programs::{TestRun as _, TestRunAttrs, TestRunOptions, Xdp, xdp::XdpMode},
};
use lb_common::bench::{Case, Tuple};
use sluice::dataplane::{SharedArray, bpf};
use std::{
    os::fd::{AsFd as _, BorrowedFd},
    time::Duration,
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sluice-bench.bpf.o"));

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The balancer.
    Balancer,
    /// A program that sends the packet back as it is.
    FloorTx,
    /// A program that swaps the Ethernet addresses and sends the packet back.
    FloorSwap,
    /// A program that hands the packet to the kernel.
    Pass,
    /// A program that makes room for an outer header and sends the packet back.
    FloorGrow,
}

impl Target {
    /// The program in front, by family.
    const fn wrapper(self, family: Family) -> &'static str {
        match (self, family) {
            (Self::Balancer, Family::V4) => "balancer4",
            (Self::Balancer, Family::V6) => "balancer6",
            (Self::FloorTx, Family::V4) => "tx4",
            (Self::FloorTx, Family::V6) => "tx6",
            (Self::FloorSwap, Family::V4) => "swap4",
            (Self::FloorSwap, Family::V6) => "swap6",
            (Self::FloorGrow, Family::V4) => "grow4",
            (Self::FloorGrow, Family::V6) => "grow6",
            (Self::Pass, Family::V4) => "pass4",
            (Self::Pass, Family::V6) => "pass6",
        }
    }
}

/// The programs in front, in the kernel.
pub struct Wrapper {
    ebpf: Ebpf,
    case: SharedArray<Case>,
    /// Addresses and ports that no arithmetic leads to.
    pub tuples: SharedArray<Tuple>,
}

/// One call: many packets.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Mean time of a packet in ns: time of this thread on its CPU.
    pub ns: f64,
    /// What the program returned for the last one.
    pub verdict: u32,
    /// The length of the last one afterwards.
    pub length: usize,
}

impl Wrapper {
    /// Loads them, with room for this many tuples.
    pub fn load(tuples: u32) -> Result<Self> {
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("tuples", tuples.max(1))
            .load(OBJECT)
            .context("the programs that prepare packets")?;
        for (name, program) in ebpf.programs_mut() {
            let program: &mut Xdp = program.try_into()?;
            program.load().with_context(|| format!("program {name}"))?;
        }
        let case = SharedArray::from_fd(Self::array(&ebpf, "case")?.try_clone_to_owned()?)?;
        let tuples = SharedArray::from_fd(Self::array(&ebpf, "tuples")?.try_clone_to_owned()?)?;
        let wrapper = Self { ebpf, case, tuples };
        for (target, name) in [
            (Target::FloorTx, "floor_tx"),
            (Target::FloorSwap, "floor_swap"),
            (Target::FloorGrow, "floor_grow"),
            (Target::Pass, "pass"),
        ] {
            wrapper.set(target, wrapper.program(name)?)?;
        }
        Ok(wrapper)
    }

    /// Measures `program` from here on.
    pub fn set(&self, target: Target, program: BorrowedFd<'_>) -> Result<()> {
        use std::os::fd::AsRawFd as _;
        let Some(Map::ProgramArray(programs)) = self.ebpf.map("programs") else {
            bail!("no map programs");
        };
        let element = (target as u32).to_ne_bytes();
        let program = program.as_raw_fd().to_ne_bytes();
        bpf::update(programs.fd().as_fd(), &element, &program, 0).context("map programs")
    }

    /// A program of the object.
    pub fn program(&self, name: &str) -> Result<BorrowedFd<'_>> {
        let program = self.ebpf.program(name);
        let program: &Xdp = program
            .ok_or_else(|| anyhow!("no program {name}"))?
            .try_into()?;
        Ok(program.fd()?.as_fd())
    }

    /// Sends packets of `case` through `target` as if they had come in on interface `ifindex` of this thread's network namespace, and lets
    /// the kernel do with them what the program says.
    pub fn send(
        &self,
        target: Target,
        family: Family,
        case: &Case,
        frame: &[u8],
        (ifindex, packets): (u32, u32),
    ) -> Result<()> {
        self.case.store(0, *case);
        let name = target.wrapper(family);
        let program = self.ebpf.program(name);
        let program: &Xdp = program
            .ok_or_else(|| anyhow!("no program {name}"))?
            .try_into()?;
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
        let context = [0, frame.len() as u32, 0, ifindex, 0, 0];
        program
            .test_run(TestRunOptions {
                data_in: Some(frame),
                ctx_in: Some(bytemuck::bytes_of(&context)),
                repeat: packets,
                attrs: TestRunAttrs::new().xdp_live_frames(64),
                ..TestRunOptions::new()
            })
            .context("BPF_PROG_TEST_RUN with live frames")?;
        let after = self.case.read(0);
        ensure!(
            after.failures == 0,
            "{} packets could not be prepared",
            after.failures
        );
        Ok(())
    }

    /// Attaches the program that counts and drops to an interface of this thread's network namespace.
    pub fn sink(&mut self, interface: &str) -> Result<()> {
        let program = self.ebpf.program_mut("sink");
        let program: &mut Xdp = program
            .ok_or_else(|| anyhow!("no program sink"))?
            .try_into()?;
        let attached = program.attach(interface, XdpMode::Driver);
        attached
            .map(drop)
            .with_context(|| format!("interface {interface}"))
    }

    /// Packets that the program has counted.
    pub fn sunk(&self) -> Result<u64> {
        let counts = self
            .ebpf
            .map("sunk")
            .ok_or_else(|| anyhow!("no map sunk"))?;
        let counts = aya::maps::PerCpuArray::<_, u64>::try_from(counts)?;
        Ok(counts.get(&0, 0)?.iter().sum())
    }

    fn array<'a>(ebpf: &'a Ebpf, name: &str) -> Result<BorrowedFd<'a>> {
        match ebpf.map(name) {
            Some(Map::Array(map)) => Ok(map.fd().as_fd()),
            _ => bail!("no array {name}"),
        }
    }

    /// Runs `target` on `packets` packets of `case`, and moves the case on by as many.
    pub fn run(
        &self,
        target: Target,
        family: Family,
        case: &mut Case,
        frame: &[u8],
        packets: u32,
        call_cost: Duration,
    ) -> Result<Run> {
        case.failures = 0;
        self.case.store(0, *case);
        let run = run(
            self.program(target.wrapper(family))?,
            frame,
            packets,
            call_cost,
        )?;
        let after = self.case.read(0);
        let (seen, failures) = (after.next - case.next, after.failures);
        case.next = after.next;
        ensure!(failures == 0, "{failures} packets could not be prepared");
        ensure!(
            seen == u64::from(packets),
            "{packets} packets were to be run, {seen} were"
        );
        Ok(run)
    }
}

/// What a call costs beside its packets: the least of several with next to none.
///
/// With a single packet the kernel would not make the program known to its dispatcher, which is most of the cost.
pub fn call_cost(program: BorrowedFd<'_>, frame: &[u8]) -> Result<Duration> {
    let mut least = Duration::MAX;
    for _ in 0..CALLS {
        let before = cpu_time();
        bpf::test_run(program, frame, 0, 2).context("BPF_PROG_TEST_RUN")?;
        least = least.min(cpu_time() - before);
    }
    Ok(least)
}

/// Calls that are made to find out what a call costs.
const CALLS: usize = 5;

/// Runs `program` on one packet many times, without anything in front. `call_cost` is not counted.
pub fn run(
    program: BorrowedFd<'_>,
    frame: &[u8],
    packets: u32,
    call_cost: Duration,
) -> Result<Run> {
    let before = cpu_time();
    let result = bpf::test_run(program, frame, 0, packets).context("BPF_PROG_TEST_RUN")?;
    let time = (cpu_time() - before).saturating_sub(call_cost);
    Ok(Run {
        ns: time.as_secs_f64() * 1e9 / f64::from(packets),
        verdict: result.verdict,
        length: result.data.len(),
    })
}

/// Time that this thread has spent on a CPU.
fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes the record it is given; this clock is always there.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}
