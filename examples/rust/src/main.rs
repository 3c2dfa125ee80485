//! Quantizes a matrix to NF4, multiplies by it from the 4-bit codes, and compares the product with
//! that of the fp32 matrix: a small safe layer over the C ABI, and a program that uses it.

mod ffi;

use std::ffi::{c_void, CStr};
use std::mem::size_of;
use std::ptr::{null, null_mut};

/// A matrix in 4 bits, in blocks of 64 elements with a scale each.
struct Nf4Matrix {
    packed: Vec<u8>,
    absmax: Vec<f32>,
    rows: usize,
    cols: usize,
}

const BLOCK_SIZE: usize = 64;

fn checked(status: i32) -> Result<(), String> {
    if status == ffi::OK {
        return Ok(());
    }
    let message = unsafe { CStr::from_ptr(ffi::qn_last_error_message()) };
    Err(message.to_string_lossy().into_owned())
}

/// Calls `run` with scratch memory that is aligned as it has to be.
fn with_workspace(bytes: i64, run: impl FnOnce(*mut c_void, i64) -> i32) -> Result<(), String> {
    let mut memory = vec![0u8; bytes as usize + ffi::WORKSPACE_ALIGNMENT];
    let padding = memory.as_ptr().align_offset(ffi::WORKSPACE_ALIGNMENT);
    checked(run(memory[padding..].as_mut_ptr().cast(), bytes))
}

impl Nf4Matrix {
    fn quantize(w: &[f32], rows: usize, cols: usize) -> Result<Self, String> {
        assert_eq!(w.len(), rows * cols);
        let mut packed = vec![0u8; w.len().div_ceil(2)];
        let mut absmax = vec![0.0f32; w.len().div_ceil(BLOCK_SIZE)];
        let output = weight(packed.as_mut_ptr(), absmax.as_mut_ptr(), rows, cols);
        let args = ffi::QuantizeArgs {
            struct_size: size_of::<ffi::QuantizeArgs>() as u64,
            input: w.as_ptr().cast(),
            output: &output,
            pinned_offset: null(),
            dtype: ffi::FLOAT32,
            reserved: 0,
        };
        let mut bytes = 0;
        checked(unsafe { ffi::qn_quantize_4bit_workspace_bytes(&args, &mut bytes) })?;
        with_workspace(bytes, |workspace, bytes| unsafe {
            ffi::qn_quantize_4bit(&args, workspace, bytes, null_mut())
        })?;
        Ok(Nf4Matrix {
            packed,
            absmax,
            rows,
            cols,
        })
    }

    /// x is [m, cols]; returns x * self^T, [m, rows].
    fn multiply(&self, x: &[f32], m: usize) -> Result<Vec<f32>, String> {
        assert_eq!(x.len(), m * self.cols);
        let mut y = vec![0.0f32; m * self.rows];
        // Only read: the pointers are what C has in one struct for both.
        let (packed, absmax) = (self.packed.as_ptr(), self.absmax.as_ptr());
        let weight = weight(packed.cast_mut(), absmax.cast_mut(), self.rows, self.cols);
        let args = ffi::MatmulArgs {
            struct_size: size_of::<ffi::MatmulArgs>() as u64,
            x: x.as_ptr().cast(),
            m: m as i64,
            x_row_stride: self.cols as i64,
            weight: &weight,
            bias: null(),
            y: y.as_mut_ptr().cast(),
            y_row_stride: self.rows as i64,
            dtype: ffi::FLOAT32,
            reserved: 0,
        };
        let mut bytes = 0;
        checked(unsafe { ffi::qn_matmul_4bit_workspace_bytes(&args, &mut bytes) })?;
        with_workspace(bytes, |workspace, bytes| unsafe {
            ffi::qn_matmul_4bit(&args, workspace, bytes, null_mut())
        })?;
        Ok(y)
    }

    fn bytes(&self) -> usize {
        self.packed.len() + self.absmax.len() * size_of::<f32>()
    }
}

fn weight(packed: *mut u8, absmax: *mut f32, rows: usize, cols: usize) -> ffi::Weight {
    ffi::Weight {
        struct_size: size_of::<ffi::Weight>() as u64,
        packed,
        absmax,
        absmax_codes: null_mut(),
        absmax2: null_mut(),
        offset: null_mut(),
        rows: rows as i64,
        cols: cols as i64,
        block_size: BLOCK_SIZE as i64,
        custom_values: null(),
        quant_type: ffi::NF4,
        device_type: ffi::CPU,
        device_index: 0,
        reserved: 0,
    }
}

/// Numbers in [-1, 1) that look random.
fn numbers(count: usize, mut seed: u32) -> Vec<f32> {
    (0..count)
        .map(|_| {
            seed = seed.wrapping_mul(1664525).wrapping_add(1013904223);
            (seed >> 8) as f32 / 8388608.0 - 1.0
        })
        .collect()
}

fn main() -> Result<(), String> {
    let (m, n, k) = (4, 256, 512);
    let (w, x) = (numbers(n * k, 1), numbers(m * k, 2));
    let matrix = Nf4Matrix::quantize(&w, n, k)?;
    let y = matrix.multiply(&x, m)?;

    let (mut error, mut norm) = (0.0f64, 0.0f64);
    for (row, products) in x.chunks(k).zip(y.chunks(n)) {
        for (column, product) in w.chunks(k).zip(products) {
            let exact: f64 = row
                .iter()
                .zip(column)
                .map(|(a, b)| *a as f64 * *b as f64)
                .sum();
            error += (*product as f64 - exact).powi(2);
            norm += exact.powi(2);
        }
    }
    let version = unsafe { CStr::from_ptr(ffi::qn_version()) }.to_string_lossy();
    let (before, after) = (w.len() * size_of::<f32>(), matrix.bytes());
    println!("qlora_native {version}: {before} bytes of fp32 in {after} of NF4");
    println!(
        "relative error of the product: {:.4}",
        (error / norm).sqrt()
    );
    Ok(())
}
