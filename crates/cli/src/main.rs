//! temp
use gpusvm_cli::machine::*;
use gpusvm_softgpu::*;
#[global_allocator]
static A: gpusvm_live::RuntimeAlloc = gpusvm_live::RuntimeAlloc;
struct Inc(u64, usize);
impl Kernel for Inc {
    fn run(&self, g: u32, t: &mut Tile<'_>) -> Result<(), Stop> {
        let mut b = vec![0u64; 2048];
        let per = 1 << 17;
        for c in 0..per / 2048 {
            let va = self.0 + (g as u64 * per + c * 2048) * 8;
            t.load(va, &mut b[..])?;
            b.iter_mut().for_each(|x| *x += 1);
            t.store(va, &b[..])?;
        }
        Ok(())
    }
}
fn main() {
    let n = 256 << 17;
    let mut v: Vec<u64> = (0..n as u64).collect();
    let copy = std::env::args().nth(1).is_some();
    let m = Machine::start(MachineConfig {
        migration: if copy {
            gpusvm_live::VramMode::Copy
        } else {
            gpusvm_live::VramMode::Adopt
        },
        ..MachineConfig::default()
    })
    .unwrap();
    println!("{:?}", m.space().level());
    for round in 0..3 {
        let t = std::time::Instant::now();
        let k = Inc(v.as_ptr() as u64, n);
        m.launch(&k, 256).unwrap();
        println!("{:?}", t.elapsed());
        let t = std::time::Instant::now();
        for (i, x) in v.iter_mut().enumerate() {
            assert_eq!(*x, i as u64 + 1 + 2 * round);
            *x += 1;
        }
        println!("cpu {:?}", t.elapsed());
    }
    print!(
        "{}",
        m.stats()
            .gt(0)
            .unwrap()
            .to_string()
            .lines()
            .filter(|l| !l.ends_with(": 0"))
            .collect::<Vec<_>>()
            .join("\n")
    );
    m.close();
    println!("\nclosed");
}
