//! How much processor time something took, the kernel's part included.

use std::{collections::HashSet, fs, process::Command, sync::OnceLock};

/// Seconds so far of the process groups `groups`, of this process's children that have ended, and of the kernel's network
/// work outside any process.
///
/// Where the kernel keeps no account of interrupts, work in them is counted with the process that was interrupted, which under load is
/// the sender or the receiver of the packets.
pub fn seconds(groups: &[u32]) -> f64 {
    let groups: HashSet<u32> = groups.iter().copied().collect();
    let mut ticks = 0;
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        if entry.file_name().as_encoded_bytes()[0].is_ascii_digit() {
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            ticks += process(&stat, &groups).unwrap_or(0);
        }
    }
    if interrupts_are_counted() {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        ticks += interrupts(&stat).unwrap_or(0);
    }
    // SAFETY: sysconf only reads.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    ticks as f64 / per_second as f64 + of_children()
}

/// Ticks of one process, if it is in one of the groups or one of the kernel's network threads.
fn process(stat: &str, groups: &HashSet<u32>) -> Option<u64> {
    // The name is in parentheses and may have any characters.
    let (name, fields) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let group = fields.get(2)?.parse().ok()?;
    let counts =
        groups.contains(&group) || (name.contains("(ksoftirqd/") && !interrupts_are_counted());
    let time = |field: usize| fields.get(field)?.parse::<u64>().ok();
    counts.then_some(())?;
    Some(time(11)? + time(12)?)
}

/// Ticks of all processors in interrupts, hard and soft.
fn interrupts(stat: &str) -> Option<u64> {
    let mut fields = stat.lines().next()?.split_whitespace().skip(6);
    let (hard, soft) = (fields.next()?.parse::<u64>(), fields.next()?.parse::<u64>());
    Some(hard.ok()? + soft.ok()?)
}

/// Whether the kernel counts interrupts apart from processes.
fn interrupts_are_counted() -> bool {
    static COUNTED: OnceLock<bool> = OnceLock::new();
    *COUNTED.get_or_init(|| {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let boot = format!("/boot/config-{}", release.trim());
        [boot.as_str(), "/proc/config.gz"].iter().any(|file| {
            let output = Command::new("zgrep")
                .args(["-q", "^CONFIG_IRQ_TIME_ACCOUNTING=y", file])
                .output();
            output.is_ok_and(|output| output.status.success())
        })
    })
}

/// Seconds of children that have ended.
fn of_children() -> f64 {
    // SAFETY: zeroes are a value of this record, which the call fills in.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_read_whatever_the_name() {
        let stat = "7 (a) b (c) S 1 42 42 0 -1 4194560 1 2 3 4 30 12 0 0 20 0 1 0 5";
        assert_eq!(process(stat, &HashSet::from([42])), Some(42));
        assert_eq!(process(stat, &HashSet::from([7])), None);
    }

    #[test]
    fn interrupts_are_two_columns() {
        assert_eq!(interrupts("cpu  1 2 3 4 5 6 7 8 0 0\n"), Some(13));
    }
}
