// --- begin pure: needs nothing of iOS but exp ---

/// What manifest.json says about the model, and the arithmetic before and after it.
enum Model {
    static let file = @FILE@
    static let input = @INPUT@
    static let output = @OUTPUT@
    static let height = @HEIGHT@
    static let width = @WIDTH@
    static let channels = @CHANNELS@
    static let channelOrder = "@ORDER@"
    static let layout = "@LAYOUT@"
    static let mode = "@MODE@"
    static let interpolation = "@INTERPOLATION@"
//: if crop
    static let resize = @RESIZE@
//: end
//: if float
    static let mean: [Double] = [@MEAN@]
    static let std: [Double] = [@STD@]
//: end

    /// Class names in the order of the scores, English and Chinese.
    static let labels: [String] = [
@LABELS@
    ]
    static let labelsZh: [String] = [
@LABELS_ZH@
    ]

    /// Width and height to scale an image of this size to, before the centre is cut out.
    static func scaledSize(width: Int, height: Int) -> (width: Int, height: Int) {
//: if stretch
        return (Model.width, Model.height)
//: end
//: if crop
        return width <= height ? (resize, resize * height / width) : (resize * width / height, resize)
//: end
    }

    /// Left and top of the centre cut out of a scaled image of this size; halves go to the even number.
    static func cropCorner(width: Int, height: Int) -> (left: Int, top: Int) {
        func middle(_ whole: Int, _ part: Int) -> Int { Int((Double(whole - part) / 2).rounded(.toNearestOrEven)) }
        return (middle(width, Model.width), middle(height, Model.height))
    }

    /// Channel `c` of pixel `i`, 0 to 255, in the order that the model takes.
    private static func channel(_ rgba: UnsafeBufferPointer<UInt8>, _ i: Int, _ c: Int) -> UInt8 {
//: if RGB
        return rgba[4 * i + c]
//: end
//: if BGR
        return rgba[4 * i + 2 - c]
//: end
//: if GRAY
        let (red, green, blue) = (Int(rgba[4 * i]), Int(rgba[4 * i + 1]), Int(rgba[4 * i + 2]))
        return UInt8((red * 19595 + green * 38470 + blue * 7471 + 32768) >> (16 + c))
//: end
    }
//: if float

    /// `height` x `width` pixels of four bytes (RGBA), row by row, to the model's input: (pixel / 255 - mean) / std, `layout`.
    static func normalize(_ rgba: [UInt8]) -> [Float] {
        precondition(rgba.count == 4 * height * width, "wanted \(4 * height * width) bytes, got \(rgba.count)")
        let (mean, std) = (Model.mean.map { Float($0) }, Model.std.map { Float($0) })
        var out = [Float](repeating: 0, count: channels * height * width)
        rgba.withUnsafeBufferPointer { bytes in
            for i in 0..<(height * width) {
                for c in 0..<channels {
                    out[@PLACE@] = (Float(channel(bytes, i, c)) / 255 - mean[c]) / std[c]
                }
            }
        }
        return out
    }
//: end
//: if uint8

    /// `height` x `width` pixels of four bytes (RGBA), row by row, to the model's input: bytes, `layout`; the file normalises.
    static func bytes(_ rgba: [UInt8]) -> [UInt8] {
        precondition(rgba.count == 4 * height * width, "wanted \(4 * height * width) bytes, got \(rgba.count)")
        return rgba.withUnsafeBufferPointer { bytes in
            (0..<(channels * height * width)).map { channel(bytes, $0 / channels, $0 % channels) }
        }
    }
//: end

    /// Scores to probabilities that add up to 1.
    static func softmax(_ scores: [Float]) -> [Float] {
        let largest = scores.max() ?? 0
        let powers = scores.map { exp(Double($0 - largest)) }
        let sum = powers.reduce(0, +)
        return powers.map { Float($0 / sum) }
    }

    /// Places of the `k` largest values, largest first; of equal ones the first.
    static func topK(_ values: [Float], _ k: Int) -> [Int] {
        let ordered = values.indices.sorted { values[$0] == values[$1] ? $0 < $1 : values[$0] > values[$1] }
        return Array(ordered.prefix(k))
    }

    /// One class and how sure the model is of it, 0 to 1.
    struct Answer {
        let label: String
        let labelZh: String
        let probability: Float
    }

    /// The `k` likeliest classes, likeliest first.
    static func answers(_ scores: [Float], _ k: Int) -> [Answer] {
        let probabilities = softmax(scores)
        return topK(probabilities, k).map {
            Answer(label: labels[$0], labelZh: labelsZh[$0], probability: probabilities[$0])
        }
    }
}

// --- end pure ---

struct ClassifierError: LocalizedError {
    let errorDescription: String?
    init(_ what: String) { errorDescription = what }
}

/// An upright image scaled and cut as the model wants it: four bytes a pixel (RGBA), row by row.
///
/// Core Graphics' filter is not Pillow's, bit for bit: a few answers may differ from those measured. golden.npz is the
/// judge of everything after this function: its `pixels` through `Classifier.scores` must give its `outputs`, within its
/// `atol`.
func pixels(of image: CGImage) throws -> [UInt8] {
    let size = Model.scaledSize(width: image.width, height: image.height)
    let corner = Model.cropCorner(width: size.width, height: size.height)
    var rgba = [UInt8](repeating: 0, count: 4 * Model.width * Model.height)
    let drawn: Bool = rgba.withUnsafeMutableBytes { room in
        guard let space = CGColorSpace(name: CGColorSpace.sRGB),
            let context = CGContext(
                data: room.baseAddress, width: Model.width, height: Model.height, bitsPerComponent: 8,
                bytesPerRow: 4 * Model.width, space: space, bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue)
        else { return false }
        context.interpolationQuality = Model.interpolation == "nearest" ? .none : .high
        // Core Graphics counts from the bottom.
        let bottom = Model.height + corner.top - size.height
        context.draw(image, in: CGRect(x: -corner.left, y: bottom, width: size.width, height: size.height))
        return true
    }
    guard drawn else { throw ClassifierError("no room to draw the image in") }
    return rgba
}
